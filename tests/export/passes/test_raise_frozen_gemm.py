import torch
from rewriting import ops, rewrite, train_step
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from edge_dit_export.passes import FOR_ONNX, apply, copy_of
from edge_dit_export.passes.raise_frozen_gemm import raise_frozen_gemm


def test_every_frozen_product_of_a_train_step_is_a_layer():
    graph = train_step()
    apply(graph[0], FOR_ONNX)
    before, after, count = rewrite(graph, raise_frozen_gemm, tolerance=1e-5)
    # 21 layers forward; 14 of them backward: none into the text or out of the first trained block.
    assert count == 35
    assert (before["linear"], after["linear"]) == (0, 21)
    assert (before["addmm"], after["addmm"]) == (9, 0)
    assert after["mm"] == before["mm"] - (21 - 9)
    frozen = {n for n in graph[0].graph.nodes if n.op == "get_attr"}
    products = [n for n in graph[0].graph.nodes if ".mm." in str(n.target)]
    assert sum(n.args[1] in frozen for n in products) == 14
    for product in products:
        assert product.args[0] not in frozen
        assert not any(frozen & set(n.all_input_nodes) for n in product.all_input_nodes)


class _Products(nn.Module):
    """Every way a frozen W [5, 4] or bias stands in a product."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(5, 4, generator=generator))
        self.register_buffer("kernel", torch.randn(5, 4, 1, 1, generator=generator))
        self.register_buffer("bias", torch.randn(5, generator=generator))
        self.register_buffer("shift", torch.randn(4, generator=generator))

    def forward(self, x, y, by_row):
        aten = torch.ops.aten
        kernel = self.kernel.view(5, 4)
        return (
            aten.mm(x, self.weight.permute(1, 0)),  # x [3, 4]
            aten.addmm(self.bias, x, self.weight.permute(1, 0)),
            aten.mm(y, self.weight),  # y [3, 5]
            aten.addmm(self.shift, y, self.weight),
            aten.mm(self.weight, by_row),  # by_row [4, 3]
            aten.mm(kernel, by_row),
            aten.mm(kernel.permute(1, 0), y.permute(1, 0)),
            aten.mm(x, by_row),  # nothing frozen
        )


def _products():
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 4), (3, 5), (4, 3))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return copy_of(make_fx(_Products())(*inputs)), inputs


def test_every_form():
    _, after, count = rewrite(_products(), raise_frozen_gemm, tolerance=1e-6)
    assert count == 7
    assert (after["linear"], after["mm"], after["addmm"]) == (4, 4, 0)


def test_a_weight_is_stored_once():
    graph = _products()
    rewrite(graph, raise_frozen_gemm, tolerance=1e-6)
    rewrite(graph, raise_frozen_gemm, tolerance=1e-6)
    shapes = sorted(tuple(buffer.shape) for _, buffer in graph[0].named_buffers())
    # The biases, W, and the kernel as a matrix; not the kernel itself.
    assert shapes == [(4,), (5,), (5, 4), (5, 4)]
    assert ops(graph[0])["linear"] == 4
