"""Exports a small sub-graph to ExecuTorch and checks what the programs compute.

Run by test_executorch.py and test_family_exports.py in a process of its own, because ExecuTorch can
abort a whole process:

    python executorch_child.py FOLDER                  the tiny sub-graph, every check
    python executorch_child.py FOLDER VARIANT SPLIT [TARGETS [TAIL]]
                                                       as `bundles.made_variant`, `FAMILY_CHECKS`

Writes the bundle and results.json there. results.json: for every check, null or the traceback of
its failure.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bundles
import tiny
from edge_dit.contract.bundle import Bundle
from edge_dit.models.int8_products import computing_in_int8, frozen_product
from edge_dit.models.pipeline import quiet
from edge_dit.models.quantize import round_frozen, rounded, to_int8
from edge_dit.models.subgraph import TrainableSubgraph


@dataclass(frozen=True)
class Exported:
    """A bundle with the executorch target alone.

    Attributes:
        opened: the bundle.
        make: the sub-graph and draw it was made from, anew at each call.
    """

    opened: Bundle
    make: Callable[[], bundles.Made]

    def session(self):
        """A session over the bundle."""
        from edge_dit_runtime.session import open_session

        return open_session(self.opened, "executorch")

    @property
    def folder(self) -> Path:
        """Of the bundle."""
        return self.opened.folder


def gradients(bundle: Exported) -> None:
    """Two draws in turn: the second must not change what the first returned."""
    sub, batch = bundle.make()
    opened = bundle.session()
    kept = []
    for draw in bundles.draws(batch, 2):
        loss = torch.tensor(opened.backward(draw))
        found = {f"grad.{n}": torch.from_numpy(g) for n, g in opened.gradients().items()}
        eager = tiny.eager(sub, {name: torch.from_numpy(value) for name, value in draw.items()})
        kept.append((eager, {"loss": loss, **found}))
    for eager, found in kept:
        tiny.assert_close(eager, found, 1e-5)


def trajectory(bundle: Exported) -> None:
    """Losses and adapter of 20 steps."""
    sub, batch = bundle.make()
    bundles.assert_trains_like_torch(bundle.session(), sub, batch)


def smoothing(bundle: Exported) -> None:
    """Gradients of several draws in an update, and the adapter's average."""
    sub, batch = bundle.make()
    bundles.assert_smooths_like_torch(bundle.session(), sub, batch)


def lean(bundle: Exported) -> None:
    """An optimizer that keeps no first moment."""
    bundles.assert_trains_without_a_first_moment(bundle.folder / "lean", "executorch")


def resume(bundle: Exported) -> None:
    """A run split in two is the run in one go."""
    _, batch = bundle.make()
    bundles.assert_resumes_bit_for_bit(bundle.session, batch)


def adapter(bundle: Exported) -> None:
    """load_adapter changes what is trained, and the loss with it."""
    _, batch = bundle.make()
    draw = bundles.draws(batch, 1)[0]
    opened = bundle.session()
    loss = opened.backward(draw)
    doubled = {name: 2 * value for name, value in opened.adapter().items()}
    opened.load_adapter(doubled)
    for name, value in opened.adapter().items():
        np.testing.assert_array_equal(value, doubled[name], err_msg=name)
    assert opened.backward(draw) != loss


def optimizer(bundle: Exported) -> None:
    """optimizer.pte against its module, late in a run, where the moments' bias hardly counts."""
    from edge_dit_export.graph.optimizer import AdamWStep
    from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

    shapes = {t.name: t.shape for t in bundle.opened.manifest.tensors if t.role == "lora"}
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(s, generator=generator) for _ in range(4) for s in shapes.values()]
    state[3 * len(shapes) :] = [value.abs() for value in state[3 * len(shapes) :]]
    arguments = [torch.tensor([1e-3]), torch.tensor([900.0]), *state]
    found = ExecuTorchProgram(bundle.folder / "executorch" / "optimizer.pte")(
        *(a.numpy() for a in arguments)
    )
    for want, have in zip(AdamWStep(bundles.ADAMW, shapes)(*arguments), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=1e-6, atol=1e-7)


def sampler(bundle: Exported) -> None:
    """patch_sampler.pte against torch's antialiased resize, images of many sizes."""
    from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

    program = ExecuTorchProgram(bundle.folder / "executorch" / "patch_sampler.pte")
    rng = np.random.default_rng(0)
    smallest, rule = bundles.CROPS.s_max, bundles.CROPS
    sides = rng.integers(smallest, bundles.MAX_IMAGE_SIDE, (100, 2), endpoint=True)
    for height, width in [*sides, (smallest,) * 2, (bundles.MAX_IMAGE_SIDE,) * 2]:
        image = rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        sigma, u, v = rng.uniform(0, 1, 3).astype(np.float32)
        (patch,) = program(image, sigma[None], np.array([u, v]))
        crop = rule.crop(sigma, u, v, int(height), int(width))
        rows, columns = (slice(start, start + crop.side) for start in (crop.top, crop.left))
        want = torch.nn.functional.interpolate(
            torch.from_numpy(image[:, :, rows, columns]),
            size=(rule.s_min,) * 2,
            mode="bilinear",
            antialias=True,
        )
        torch.testing.assert_close(torch.from_numpy(patch), want, rtol=0, atol=1e-5)


def bad_file(bundle: Exported) -> None:
    """What is no program is refused with the file's name."""
    from edge_dit.errors import BadInput
    from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

    path = bundle.folder / "broken.pte"
    path.write_bytes(bytes(2048))
    with pytest.raises(BadInput, match=r"broken\.pte"):
        ExecuTorchProgram(path)


def frozen_layers(bundle: Exported) -> None:
    """Forward: 8 attention layers, 2 feed-forward products and a depthwise convolution in both
    blocks, and proj_out. Backward: the same, except that no gradient goes into the text (attn2's
    to_k and to_v), nor out of the first trained block (its attn1's to_q, to_k and to_v).
    """
    assert _needed_layers(*bundle.make()) == (2 * 11 + 1) * 2 - 2 * 2 - 3


def every_frozen_layer_is_delegated(bundle: Exported) -> None:
    """Each one that the step needs, and none twice."""
    programs = bundle.opened.manifest.targets["executorch"]["programs"]
    assert programs["train.pte"]["frozen_layers"] == _needed_layers(*bundle.make())
    assert programs["train.pte"]["delegated"] >= programs["train.pte"]["frozen_layers"]


class _Operations(nn.Module):
    """Every kind of call that is delegated, each with a result of at least 4096 elements."""

    def __init__(self) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        shapes = {
            "weight": (96, 80),
            "bias": (96,),
            "row": (80,),
            "scales": (4, 1, 1),
            "shift": (5,),
        }
        for name, shape in {**shapes, "depthwise": (6, 1, 3, 3), "whole": (5, 6, 3, 3)}.items():
            self.register_buffer(name, torch.randn(shape, generator=seeded))

    def forward(self, x: Tensor, y: Tensor, z: Tensor, many: Tensor, image: Tensor):
        """X [64, 80], y [64, 96], z [80, 64], many [4, 40, 32], image [1, 6, 32, 40]."""
        aten = torch.ops.aten
        turned = many.permute(0, 2, 1)
        settings = ([1, 1], [1, 1], [1, 1], False, [0, 0])
        return (
            aten.linear(x, self.weight),
            aten.linear(x, self.weight, self.bias),
            aten.mm(y, self.weight),
            aten.mm(x, z),
            aten.bmm(many, turned),
            turned + 0.0,
            image.permute(0, 2, 3, 1) + 0.0,
            aten._softmax(many, -1, False),
            aten._softmax(many, 1, False),
            aten.sigmoid(many),
            many * self.scales,
            x * self.row,
            x + z.permute(1, 0)[:, :1],
            x - self.row,
            1.0 - x,
            x * 0.25,
            aten.mul.Scalar(many, -3.0),
            aten.add.Tensor(x, x, alpha=2.0),
            aten.convolution(image, self.depthwise, None, *settings, 6),
            aten.convolution(image, self.whole, self.shift, *settings, 1),
        )


def every_delegated_operation_is_torchs(bundle: Exported) -> None:
    """And the smaller ones, which are not delegated, stay what they were."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from edge_dit_export import passes
    from edge_dit_export.targets.executorch import _lower
    from edge_dit_export.targets.xnnpack import Delegates
    from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

    seeded = torch.Generator().manual_seed(1)
    shapes = ((64, 80), (64, 96), (80, 64), (4, 40, 32), (1, 6, 32, 40))
    inputs = tuple(torch.randn(shape, generator=seeded) for shape in shapes)
    expected = _Operations()(*inputs)
    module = passes.copy_of(make_fx(_Operations(), pre_dispatch=True)(*inputs))
    passes.apply(module, (passes.float_scalars,))
    delegates = Delegates(module)
    # Not the softmax over rows, nor the sum with alpha; but both permutes, and what adds to them.
    left = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert left.count(torch.ops.aten._softmax.default) == 1
    assert left.count(torch.ops.aten.add.Tensor) == 1
    assert delegates.calls == left.count(torch.ops.edge_dit.delegated.default)
    assert delegates.calls >= len(expected) - 2
    assert delegates.layers == 5
    # Only what XNNPACK packs is a constant of a delegate: it may free others before it reads them.
    constants = [lowered.named_data_store_output.pte_data for lowered in delegates._lowered]
    assert sum(map(bool, constants)) == delegates.layers
    path = bundle.folder / "operations.pte"
    with quiet(), path.open("wb") as stream:
        program = torch.export.export(module, inputs, strict=False)
        _lower(program, delegates).write_to_file(stream)
    found = ExecuTorchProgram(path)(*(tensor.numpy() for tensor in inputs))
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(one - other.numpy()).max() / np.abs(other.numpy()).max()
        assert error < 2e-6, f"result {number}: {error}"


class _Int8Products(nn.Module):
    """Both directions of two products; one of them runs twice.

    Their int8 values are the same, their scales are not.
    """

    def __init__(self) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        weight = rounded(torch.randn(96, 80, generator=seeded), "int8")
        self.register_buffer("weight", weight)
        self.register_buffer("larger", 4 * weight)

    def forward(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """X [64, 80], dy [64, 96]."""
        return (
            frozen_product(x, self.weight, False, True),
            frozen_product(x, self.larger, False, True),
            frozen_product(dy, self.weight, True, True),
            frozen_product(dy, self.larger, True, True),
            frozen_product(x + 1.0, self.weight, False, True),
        )


def int8_products_are_the_operators(bundle: Exported) -> None:
    """Level by level: rows that are zero, positive, negative, small and large. Weights are packed
    once for each direction.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    from edge_dit_export import passes
    from edge_dit_export.graph.flat_program import flat_program
    from edge_dit_export.targets.executorch import _lower
    from edge_dit_export.targets.xnnpack import Delegates
    from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

    seeded = torch.Generator().manual_seed(1)
    inputs = (torch.randn(64, 80, generator=seeded), torch.randn(64, 96, generator=seeded))
    for tensor in inputs:
        tensor *= torch.logspace(-4, 4, 64)[:, None]
        tensor[0] = 0
        tensor[1:3] = tensor[1:3].abs() * torch.tensor([[1], [-1]])
    expected = _Int8Products()(*inputs)
    module = passes.copy_of(make_fx(_Int8Products())(*inputs))
    passes.apply(module, passes.FOR_EXECUTORCH)
    delegates = Delegates(module)
    assert delegates.layers == len(expected)
    path = bundle.folder / "int8.pte"
    with quiet(), path.open("wb") as stream:
        program = _lower(flat_program(module, inputs), delegates)
        program.write_to_file(stream)
    (plan,) = program.executorch_program.execution_plan
    # Forward each has its scales; the way back sees int8 values alone, and they are the same.
    assert len(plan.delegates) == delegates.calls - 2
    # They lie in the file once, for both directions.
    values, _ = to_int8(_Int8Products().weight)
    assert path.read_bytes().count(values.numpy().tobytes()) == 1
    found = ExecuTorchProgram(path)(*(tensor.numpy() for tensor in inputs))
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        difference = torch.from_numpy(one) - other
        error = (difference.norm(dim=1) / other.norm(dim=1).clamp(min=1e-9)).max()
        assert error < 1e-6, f"result {number}: {error}"


def int8_step(bundle: Exported) -> None:
    """A step with int8 products against PyTorch with the same ones.

    A value at the border of two levels is rounded the one way here and the other way there, if what
    it was computed from differs in the last digit. So not every draw agrees to all digits.
    """
    from edge_dit_export.targets.executorch import write
    from edge_dit_export.targets.source import Source
    from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

    sub, batch = bundle.make()
    folder = bundle.folder / "int8"
    folder.mkdir()
    source = Source(sub, batch, bundles.ADAMW, bundles.CROPS, "int8", compute="int8")
    with quiet():
        facts = write(source, folder)
    assert facts["compute"] == "int8"
    program = ExecuTorchProgram(folder / "train.pte")
    lora = [parameter.detach().numpy() for parameter in sub.lora_parameters().values()]
    round_frozen(sub, "int8")
    blocks = [sub.get_submodule(name) for name in (*sub.order, *sub.after)]
    errors = []
    for draw in bundles.draws(batch, 9):
        found = program(*draw.values(), *lora)
        with computing_in_int8(blocks, rows=True):
            eager = tiny.eager(sub, {name: torch.from_numpy(v) for name, v in draw.items()})
        pairs = [(a, torch.from_numpy(b)) for a, b in zip(eager.values(), found, strict=True)]
        errors.append(max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
    assert np.median(errors) < 1e-5, errors
    assert max(errors) < 0.1, errors


def _needed_layers(sub: TrainableSubgraph, batch: dict[str, Tensor]) -> int:
    """Frozen linear layers and convolutions that the loss depends on, plus those of them whose
    gradient with respect to their input is needed.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    reached: set[int] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        number = len(calls)
        calls.append((inputs[0], output))
        if output.requires_grad:
            output.register_hook(lambda _gradient: reached.add(number))

    for module in sub.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
            module.register_forward_hook(note)
    sub(batch).backward()
    return sum(
        1 + x.requires_grad
        for number, (x, y) in enumerate(calls)
        if number in reached or not y.requires_grad
    )


FAMILY_CHECKS = (
    trajectory,
    resume,
    every_frozen_layer_is_delegated,
)
CHECKS = (
    gradients,
    trajectory,
    smoothing,
    lean,
    resume,
    adapter,
    optimizer,
    sampler,
    bad_file,
    frozen_layers,
    every_frozen_layer_is_delegated,
    every_delegated_operation_is_torchs,
    int8_products_are_the_operators,
    int8_step,
)


def main(folder: Path, *variant: str) -> None:
    with quiet():
        import executorch.exir  # noqa: F401 - torchao, which it imports, warns
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated")  # see pyproject.toml

    def make() -> bundles.Made:
        return bundles.made_variant(*variant) if variant else tiny.subgraph()

    *_, opened = bundles.write(folder, "executorch", made=make())
    bundle = Exported(opened, make)
    results: dict[str, str | None] = {}
    for check in FAMILY_CHECKS if variant else CHECKS:
        try:
            check(bundle)
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
