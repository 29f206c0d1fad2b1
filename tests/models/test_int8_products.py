import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from edge_dit.models.int8_products import (
    Int8Conv1x1,
    Int8Linear,
    computing_in_int8,
    frozen_product,
    quantized,
)
from edge_dit.models.quantize import rounded, to_int8

SIZES = st.integers(1, 40)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**16), SIZES, SIZES, SIZES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_product_is_one_of_integers(seed, rows, inputs, outputs, back):
    x = numbers(seed, rows, outputs if back else inputs)
    weight = numbers(seed + 1, outputs, inputs)
    values, scale = to_int8(weight)
    levels, own = quantized(x * scale if back else x)
    assert torch.equal(levels, levels.round())
    assert levels.max() - levels.min() <= 255
    whole = levels.long().numpy(), values.long().numpy()
    sums = whole[0] @ (whole[1] if back else whole[1].T)
    want = sums * np.float32(own) * (1 if back else scale.numpy())
    np.testing.assert_allclose(frozen_product(x, weight, back), want, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**16), st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_rounding_moves_a_value_by_half_a_level(seed, size):
    x = size * numbers(seed, 7, 9)
    levels, scale = quantized(x)
    assert float((levels * scale - x).abs().max()) <= 0.5001 * float(scale)
    assert float(quantized(torch.zeros(3, 2))[0].abs().max()) == 0


def test_every_picture_of_a_batch_has_its_own_range():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6).requires_grad_(False)
    x = torch.randn(3, 5, 8) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    with computing_in_int8([linear]):
        together, alone = linear(x), [linear(one[None]) for one in x]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_the_gradient_is_the_product_back():
    x, weight, dy = numbers(0, 6, 5).requires_grad_(), numbers(1, 4, 5), numbers(2, 6, 4)
    (dx,) = torch.autograd.grad(frozen_product(x, weight, False), x, dy)
    assert torch.equal(dx, frozen_product(dy, weight, True))
    exact = dy @ weight
    assert 0 < float((dx - exact).norm() / exact.norm()) < 0.03


def test_what_is_rounded_already_stays():
    x, weight = numbers(0, 6, 5), numbers(1, 4, 5)
    same = frozen_product(x, rounded(weight, "int8"), False)
    assert torch.equal(same, frozen_product(x, weight, False))


def test_layers_differ_from_float_by_rounding_alone():
    torch.manual_seed(0)
    linear, conv = nn.Linear(8, 6), nn.Conv2d(8, 6, 1)
    x, image = torch.randn(2, 5, 8), torch.randn(1, 8, 3, 4)
    for module in (linear, conv):
        module.requires_grad_(False)
    exact = linear(x), conv(image)
    with computing_in_int8([linear, conv]):
        assert (type(linear), type(conv)) == (Int8Linear, Int8Conv1x1)
        found = linear(x), conv(image)
    assert (type(linear), type(conv)) == (nn.Linear, nn.Conv2d)
    for one, other in zip(exact, found, strict=True):
        assert one.shape == other.shape
        assert 0 < float((one - other).norm() / one.norm()) < 0.03


def test_lora_is_trained_beside_it_and_names_stay():
    subgraph, batch, _ = tiny.traced()
    names = list(subgraph.state_dict())
    exact = _gradients(subgraph, batch)
    with computing_in_int8(map(subgraph.get_submodule, subgraph.order)):
        assert list(subgraph.state_dict()) == names
        found = _gradients(subgraph, batch)
    together = torch.nn.functional.cosine_similarity(exact, found, dim=0)
    assert 0.98 < float(together) < 1 - 1e-7
    assert torch.equal(_gradients(subgraph, batch), exact)


def _gradients(subgraph, batch):
    parameters = list(subgraph.lora_parameters().values())
    found = torch.autograd.grad(subgraph(batch), parameters)
    return torch.cat([gradient.flatten() / gradient.norm() for gradient in found])


@pytest.mark.parametrize("back", [False, True])
def test_it_is_traced_as_one_operation(back):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x, w: frozen_product(x, w, back))(numbers(0, 4, 4), numbers(1, 4, 4))
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.edge_dit.frozen_product.default]
