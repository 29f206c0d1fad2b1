"""Exports that are wrong are caught, with the tensor named; exports that are right are let pass.

Each corruption is what a wrong exporter could write: the files change, and the manifest's hashes
with them, so that nothing but the comparison with PyTorch can tell.
"""

from __future__ import annotations

import copy
import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Graph, set_attribute
from onnx import external_data_helper

from edge_dit.app.verify import Search, differences, verify
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER, Bundle, FileSpec, open_bundle, write_manifest
from edge_dit.contract.certificate import Draws, TargetResult
from edge_dit.contract.integrity import content_faults
from edge_dit.contract.targets import TARGETS
from edge_dit.planning.plan import Plan, model_of
from edge_dit.store.files import sha256
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.measure import Point, measure, patches, replayed
from edge_dit_runtime.session import open_sampler, open_session

STEPS = 20
"""As `edge-dit verify`: in fewer a weight decay ten times too large stays within tolerance."""
TRAIN_STEP = "onnx/train_step.onnx"
OPTIMIZER = "onnx/optimizer.onnx"
ORT_STEP = "ort-training/training_model.onnx"
ORT_OPTIMIZER = "ort-training/optimizer_model.onnx"


def block(number: int, name: str) -> str:
    """A frozen weight as the fused graph calls it."""
    return f"transformer_blocks__{number}__{name.replace('.', '__')}"


def lora(number: int, name: str) -> str:
    return f"transformer.transformer_blocks.{number}.{name}.weight"


def gradient(number: int, name: str) -> str:
    return f"gradients.{lora(number, name)}"


# The mistakes. Forward: modulation, norms, attention, feed-forward, LoRA, head, loss.


def no_scale(graph: Graph) -> None:
    norm = graph.node("LayerNormalization", "entry")
    graph.bypass(graph.after(norm, "Mul"), norm.output[0])


def no_shift(graph: Graph) -> None:
    scaled = graph.after(graph.node("LayerNormalization", "entry"), "Mul")
    graph.bypass(graph.after(scaled, "Add"), scaled.output[0])


def no_gate(graph: Graph) -> None:
    gated = graph.before(graph.node("Add", "entry").input[1])
    graph.bypass(gated, gated.input[1])


def scale_for_shift(graph: Graph) -> None:
    split = graph.node("Split")
    split.output[0], split.output[1] = split.output[1], split.output[0]


def no_residual(graph: Graph) -> None:
    added = graph.node("Add", "entry")
    graph.bypass(added, added.input[1])


def norm_eps(value: float) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        for node in graph.proto.node:
            if node.op_type == "LayerNormalization":
                set_attribute(node, "epsilon", value)

    return change


def no_relu(graph: Graph) -> None:
    relu = graph.node("Relu")
    graph.bypass(relu, relu.input[0])


def softmax_axis(graph: Graph) -> None:
    set_attribute(graph.node("Softmax"), "axis", 2)


def attention_scale(graph: Graph) -> None:
    softmax = graph.node("Softmax")
    score = softmax.input[0]
    softmax.input[0] = graph.insert("Mul", [score, graph.constant(1.1)], softmax)


def quick_gelu(graph: Graph) -> None:
    """SiLU as x sigmoid(1.702 x)."""
    sigmoid = graph.node("Sigmoid")
    sigmoid.input[0] = graph.insert("Mul", [sigmoid.input[0], graph.constant(1.702)], sigmoid)


def no_bias(graph: Graph) -> None:
    del graph.node("Gemm", block(1, "attn2.to_out.0.bias")).input[2]


def no_convolution_bias(graph: Graph) -> None:
    del graph.node("Conv", block(2, "ff.conv_depth.bias")).input[2]


def transposed(number: int, name: str) -> Callable[[Graph], None]:
    return lambda graph: graph.change(block(number, name), np.transpose)


def louder(value: np.ndarray) -> np.ndarray:
    return value * np.float32(1.01)


def without_a_row(value: np.ndarray) -> np.ndarray:
    value[3] = 0
    return value


def rows_swapped(value: np.ndarray) -> np.ndarray:
    value[[0, 1]] = value[[1, 0]]
    return value


def perturbed(value: np.ndarray) -> np.ndarray:
    return value + np.random.default_rng(0).normal(0, 1e-3, value.shape).astype(np.float32)


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Graph], None]:
    return lambda graph: graph.change(name, change)


def lora_scale(factor: float) -> Callable[[Graph], None]:
    """Of the first LoRA in the forward pass; alpha / r is 2 here."""

    def change(graph: Graph) -> None:
        up = graph.node("Gemm", lora(1, "attn1.to_q.lora_B"))
        scaled = graph.after(graph.after(up, "Reshape"), "Mul")
        scaled.input[1] = graph.constant(factor)

    return change


def lora_of_another_block(graph: Graph) -> None:
    one, other = lora(1, "attn1.to_q.lora_A"), lora(2, "attn1.to_q.lora_A")
    first, second = graph.node("Gemm", one), graph.node("Gemm", other)
    first.input[1], second.input[1] = other, one


def no_lora(graph: Graph) -> None:
    up = graph.node("Gemm", lora(2, "attn2.to_v.lora_B"))
    added = graph.after(graph.after(graph.after(up, "Reshape"), "Mul"), "Add")
    graph.bypass(added, added.input[0])


def no_tail(graph: Graph) -> None:
    added = graph.node("Add", "tail_residual")
    graph.bypass(added, added.input[0])


def target_sign(graph: Graph) -> None:
    graph.node("Sub", "target").op_type = "Add"


def summed_loss(graph: Graph) -> None:
    graph.before(graph.before("loss").input[0]).op_type = "ReduceSum"


# Backward only: the loss is right.


def gradients_swapped(graph: Graph) -> None:
    graph.swap(
        f"grad.{lora(1, 'attn1.to_q.lora_A')}",
        f"grad.{lora(2, 'attn1.to_q.lora_A')}",
    )


def gradient_zeroed(graph: Graph) -> None:
    graph.output(f"grad.{lora(2, 'ff.conv_point.lora_B')}", "Mul", graph.constant(0))


def gradient_scaled(graph: Graph) -> None:
    graph.output(f"grad.{lora(1, 'attn2.to_v.lora_B')}", "Mul", graph.constant(1.001))


def gradient_sign(graph: Graph) -> None:
    graph.output(f"grad.{lora(1, 'attn1.to_out.0.lora_A')}", "Neg")


def convolution_not_turned(graph: Graph) -> None:
    """The backward of the depthwise convolution needs its kernel upside down."""
    graph.change(block(2, "ff.conv_depth.weight__turned"), lambda kernel: kernel[..., ::-1, ::-1])


# AdamW: loss and gradients are right.


def stale(value: float, new: float) -> Callable[[Graph], None]:
    return lambda graph: graph.change(graph.scalar(value), lambda _: np.array(new, np.float32))


def no_bias_correction(graph: Graph) -> None:
    """The two corrections 1 - beta^t are computed from tanh."""
    tangents = [node.output[0] for node in graph.proto.node if node.op_type == "Tanh"]
    assert len(tangents) == 2
    for tangent in tangents:
        doubled = graph.node("Mul", tangent)
        graph.replace(graph.after(doubled, "Div").output[0], graph.constant(1))


def baked(name: str, value: list[float]) -> Callable[[Graph], None]:
    """An input that the graph no longer reads."""
    return lambda graph: graph.replace(name, graph.constant(value))


def never_clipped(graph: Graph) -> None:
    graph.replace(graph.node("Clip").output[0], graph.constant(1))


def attribute(name: str, value: Any) -> Callable[[Graph], None]:
    return lambda graph: set_attribute(graph.node("AdamWOptimizer"), name, value)


def clipped_early(graph: Graph) -> None:
    ratio = next(node for node in graph.proto.node if node.output[0] == "clip.ratio")
    ratio.input[0] = graph.constant([1e-3])


@dataclass(frozen=True)
class Corruption:
    """A mistake in one file of a bundle.

    Attributes:
        name: what went wrong.
        change: of the graph, or of the frozen tensors by name.
        named: patterns of tensor names; each must have failed, and the worst must be of one.
        spared: patterns; none may have failed.
        file: that is changed.
        layout: that is compared.
    """

    name: str
    change: Callable[[Any], None]
    named: tuple[str, ...] = ("loss", "gradients.*")
    spared: tuple[str, ...] = ()
    file: str = TRAIN_STEP
    layout: str = "fused"

    @property
    def target(self) -> str:
        return self.file.partition("/")[0]


ONLY_ADAMW = {"named": ("optimizer.*",), "spared": ("loss", "gradients.*")}


def only(*gradients: str) -> dict[str, tuple[str, ...]]:
    """Of a mistake in some gradients alone: those fail, all others of the first step pass."""
    return {"named": gradients, "spared": ("loss", "gradients.*")}


def near(number: int, module: str) -> tuple[str, ...]:
    """What a mistake too small for the loss shows in most: LoRA that it passes first."""
    return (f"gradients.*_blocks.{number}.{module}.*", f"*_blocks.{number}.{module}.*")


CORRUPTIONS = [
    Corruption("modulation: no scale", no_scale),
    Corruption("modulation: no shift", no_shift),
    Corruption("modulation: no gate", no_gate),
    Corruption("modulation: scale for shift", scale_for_shift),
    Corruption("no residual around attention", no_residual),
    Corruption("norm eps 1e-3 for 1e-6", norm_eps(1e-3), ("gradients.*", "adapter.*")),
    Corruption("linear attention without ReLU", no_relu),
    Corruption("softmax over queries", softmax_axis),
    Corruption("attention scale 10 % off", attention_scale, near(1, "attn2.to_v")),
    Corruption("GELU's approximation for SiLU", quick_gelu, near(1, "ff.conv_inverted")),
    Corruption("bias of attention dropped", no_bias),
    Corruption("bias of convolution dropped", no_convolution_bias),
    Corruption("square weight transposed", transposed(1, "attn1.to_k.weight")),
    Corruption(
        "frozen weight 1 % too large",
        weight(block(1, "attn1.to_v.weight"), louder),
        near(1, "attn1.to_out.0"),
    ),
    Corruption("row of a frozen weight zero", weight(block(2, "attn1.to_v.weight"), without_a_row)),
    Corruption(
        "rows of a frozen weight swapped",
        weight(block(2, "attn2.to_k.weight"), rows_swapped),
        ("gradients.*_blocks.2.attn2.to_v.*", "gradients.*", "adapter.*"),
    ),
    Corruption("head perturbed by 1e-3", weight("proj_out__weight", perturbed)),
    Corruption("LoRA scale halved", lora_scale(1.0), near(1, "attn1.to_q")),
    Corruption("LoRA scale r / alpha for alpha / r", lora_scale(0.5), near(1, "attn1.to_q")),
    Corruption(
        "LoRA of another block",
        lora_of_another_block,
        tuple(f"gradients.*_blocks.{number}.attn1.to_q.*" for number in (1, 2)),
    ),
    Corruption("LoRA left out", no_lora),
    Corruption("no tail residual", no_tail),
    Corruption("target of the wrong sign", target_sign),
    Corruption("sum for mean in the loss", summed_loss, ("loss", "trajectory"), ("gradients.*",)),
    Corruption(
        "two gradients swapped",
        gradients_swapped,
        **only(gradient(1, "attn1.to_q.lora_A"), gradient(2, "attn1.to_q.lora_A")),
    ),
    Corruption("gradient zero", gradient_zeroed, **only(gradient(2, "ff.conv_point.lora_B"))),
    Corruption(
        "gradient 0.1 % too large", gradient_scaled, **only(gradient(1, "attn2.to_v.lora_B"))
    ),
    Corruption(
        "gradient of the wrong sign", gradient_sign, **only(gradient(1, "attn1.to_out.0.lora_A"))
    ),
    Corruption(
        "kernel not turned in the backward pass",
        convolution_not_turned,
        (*near(2, "ff.conv_inverted"), "gradients.*_blocks.1.*"),
        ("loss", "gradients.*_blocks.2.ff.conv_point.*"),
    ),
    Corruption("stale beta1", stale(0.9, 0.95), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("stale beta2", stale(0.999, 0.99), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("stale eps", stale(1e-6, 1e-4), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("stale weight decay", stale(0.01, 0.1), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("no weight decay", stale(0.01, 0.0), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("weight decay 0.05", stale(0.01, 0.05), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("no bias correction", no_bias_correction, file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("lr baked in", baked("lr", [1e-3]), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("step baked in", baked("step", [3]), file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("never clipped", never_clipped, file=OPTIMIZER, **ONLY_ADAMW),
    Corruption("no tail residual", no_tail, file="onnx/head.onnx", layout="streamed"),
    Corruption("target of the wrong sign", target_sign, file="onnx/head.onnx", layout="streamed"),
    Corruption("no tail residual", no_tail, file=ORT_STEP),
    Corruption("modulation: no scale", no_scale, file=ORT_STEP),
    Corruption("no residual around attention", no_residual, file=ORT_STEP),
    Corruption("stale beta2", attribute("beta", 0.99), file=ORT_OPTIMIZER, **ONLY_ADAMW),
    Corruption(
        "stale weight decay", attribute("weight_decay", 0.1), file=ORT_OPTIMIZER, **ONLY_ADAMW
    ),
    Corruption("stale eps", attribute("epsilon", 1e-4), file=ORT_OPTIMIZER, **ONLY_ADAMW),
    Corruption("clipped at a thousandth", clipped_early, file=ORT_OPTIMIZER, **ONLY_ADAMW),
    Corruption("never clipped", baked("clip.factor", [1]), file=ORT_OPTIMIZER, **ONLY_ADAMW),
    Corruption("lr baked in", baked("learning_rate", [1e-3]), file=ORT_OPTIMIZER, **ONLY_ADAMW),
    Corruption("no weight decay", attribute("weight_decay", 0.0), file=ORT_OPTIMIZER, **ONLY_ADAMW),
]


@dataclass(frozen=True)
class Truth:
    """What PyTorch computes."""

    bundle: Path
    bank: Any
    adapter: dict[str, np.ndarray]
    points: list[Point]
    found: dict[str, np.ndarray]


def eager_session(bundle: Bundle) -> Any:
    from edge_dit.reference.eager import EagerSession, adapted_subgraph

    plan = Plan.model_validate(bundle.manifest.plan)
    subgraph, _ = adapted_subgraph(plan, model_of(plan))
    return EagerSession(subgraph, bundle.manifest.optimizer)


@pytest.fixture(scope="module")
def truth(road) -> Truth:
    bundle = open_bundle(road.bundle)
    bank = Bank(road.bank, bundle.manifest.plan_hash)
    adapter = bundle.adapter()
    session = eager_session(bundle)
    search = Search(session, bank, STEPS)
    found = measure(session, bank, adapter, STEPS, search.next)
    return Truth(road.bundle, bank, adapter, search.points, found)


@pytest.fixture(scope="module")
def loaded(truth):
    """Graphs of the right bundle by file, each loaded once."""
    models: dict[str, onnx.ModelProto] = {}

    def load(file: str) -> onnx.ModelProto:
        if file not in models:
            models[file] = onnx.load(truth.bundle / file)
            external_data_helper.convert_model_from_external_data(models[file])
        return copy.deepcopy(models[file])

    return load


def copied(bundle: Path, target: str, folder: Path) -> Path:
    """The bundle, as far as a target reads it."""
    shutil.copytree(bundle / target, folder / target)
    for name in (ADAPTER, "manifest.json"):
        shutil.copy(bundle / name, folder)
    return folder


def relist(bundle: Path, target: str) -> None:
    """Let the manifest tell the truth of the files that are there."""
    manifest = open_bundle(bundle).manifest
    files = [
        FileSpec(path=file.path, bytes=path.stat().st_size, sha256=sha256(path))
        if file.path.startswith(f"{target}/")
        else file
        for file in manifest.files
        for path in [bundle / file.path]
    ]
    write_manifest(bundle, manifest.model_copy(update={"files": files}))
    assert content_faults(open_bundle(bundle), target, verify_hashes=True) == []


def compared(truth: Truth, bundle: Path, target: str, layout: str | None = None) -> TargetResult:
    """As `edge_dit.app.verify.verify` compares, but in this process."""
    session = open_session(open_bundle(bundle), target, layout)
    found = measure(session, truth.bank, truth.adapter, STEPS, replayed(truth.points))
    return result_of(truth.found, found, target)


def result_of(want: dict[str, Any], found: dict[str, Any], target: str) -> TargetResult:
    rows = differences(want, found, TARGETS[target].tolerances)
    return TargetResult(Draws([], [], []), rows)


def matching(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def check_caught(corruption: Corruption, result: TargetResult) -> None:
    """That the comparison failed where it should, and nowhere else."""
    failed = [row.name for row in result.failed]
    assert not result.passed
    for pattern in corruption.named:
        assert matching(pattern, failed), f"{pattern} passed; failed: {failed}"
    assert any(matching(pattern, failed[:1]) for pattern in corruption.named), failed
    for pattern in corruption.spared:
        named = {name for wanted in corruption.named for name in matching(wanted, failed)}
        assert not set(matching(pattern, failed)) - named


@pytest.mark.parametrize(
    "corruption", CORRUPTIONS, ids=lambda c: f"{c.target}, {c.layout}: {c.name}"
)
def test_a_wrong_export_is_caught_and_named(truth, loaded, tmp_path, corruption):
    bundle = copied(truth.bundle, corruption.target, tmp_path)
    model = loaded(corruption.file)
    before = model.SerializeToString(deterministic=True)
    corruption.change(Graph(model.graph))
    assert model.SerializeToString(deterministic=True) != before
    onnx.save(model, bundle / corruption.file)
    relist(bundle, corruption.target)
    check_caught(corruption, compared(truth, bundle, corruption.target, corruption.layout))


FROZEN = [
    ("onnx", "streamed", "transformer_blocks.1.attn1.to_v.weight", louder, (1, "attn1.to_out.0")),
    ("onnx", "streamed", "transformer_blocks.2.attn1.to_k.weight", np.transpose, None),
    ("ort-training", None, "transformer_blocks.1.attn1.to_k.weight", np.transpose, None),
    ("ort-training", None, "transformer_blocks.2.attn1.to_v.weight", without_a_row, None),
]


@pytest.mark.parametrize(("target", "layout", "name", "change", "place"), FROZEN)
def test_wrong_frozen_weights_are_caught(truth, tmp_path, target, layout, name, change, place):
    bundle = copied(truth.bundle, target, tmp_path)
    path = bundle / target / "frozen.safetensors"
    file = TensorFile(path)
    tensors = file.read()
    tensors[name] = np.ascontiguousarray(change(tensors[name].copy()))
    write_tensors(path, tensors)
    relist(bundle, target)
    named = near(*place) if place else ("loss", "gradients.*")
    check_caught(Corruption(name, change, named), compared(truth, bundle, target, layout))


@pytest.mark.parametrize(
    ("target", "layout"), [("onnx", "fused"), ("onnx", "streamed"), ("ort-training", None)]
)
def test_the_right_export_passes_in_the_same_comparison(truth, target, layout):
    result = compared(truth, truth.bundle, target, layout)
    assert result.passed, result.failed[:1]


def test_the_certificate_says_it(truth, road, loaded, tmp_path):
    """The whole of `edge-dit verify`, process and all."""
    bundle = copied(truth.bundle, "onnx", tmp_path)
    model = loaded(TRAIN_STEP)
    gradient_zeroed(Graph(model.graph))
    onnx.save(model, bundle / TRAIN_STEP)
    relist(bundle, "onnx")
    certificate = verify(bundle, road.bank, steps=1, targets=["onnx"])
    assert certificate.changed_files == []
    assert not certificate.passed
    worst = certificate.targets["onnx"].failed[0]
    assert worst.name == gradient(2, "ff.conv_point.lora_B")
    assert certificate.targets["onnx (streamed)"].passed


# No false alarm


def seeded(bank: Bank, adapter: dict[str, np.ndarray], seed: int) -> tuple[list[Any], Any]:
    """Other draws, and another initial adapter, of the same shapes and sizes."""
    rng = np.random.default_rng(seed)
    noisy = ("entry", "tail_residual", "target")
    draws = [
        {
            name: value + rng.normal(0, value.std(), value.shape).astype(np.float32)
            if name in noisy
            else value
            for name, value in draw.items()
        }
        for draw in bank
    ]
    other = {
        name: rng.normal(0, value.std() or 0.02, value.shape).astype(np.float32)
        for name, value in adapter.items()
    }
    return draws, other


def check_no_alarm(truth: Truth, seed: int, sessions: list[tuple[str, str | None]]) -> None:
    opened = open_bundle(truth.bundle)
    bank, adapter = seeded(truth.bank, truth.adapter, seed)
    eager: Any = eager_session(opened)
    search = Search(eager, bank, STEPS)  # type: ignore[arg-type]
    want = measure(eager, bank, adapter, STEPS, search.next)  # type: ignore[arg-type]
    for target, layout in sessions:
        session = open_session(opened, target, layout)
        found = measure(session, bank, adapter, STEPS, replayed(search.points))  # type: ignore[arg-type]
        result = result_of(want, found, target)
        assert result.passed, (seed, target, layout, result.failed[:1])


@pytest.mark.parametrize("seed", range(2))
def test_no_false_alarm(truth, seed):
    check_no_alarm(truth, seed, [("onnx", "fused")])


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(50))
def test_no_false_alarm_in_fifty_runs(truth, seed):
    targets = [("onnx", "fused"), ("onnx", "streamed"), ("ort-training", None)]
    check_no_alarm(truth, seed, targets)


# The patch sampler


def off_by_one_crop(graph: Graph) -> None:
    """The crop starts a pixel too low."""
    start = graph.node("Min")
    reader = graph.after(start, "GreaterOrEqual")
    moved = graph.insert("Add", [start.output[0], graph.constant(1)], reader)
    for node in list(graph.proto.node):
        if node.output[0] != moved and start.output[0] in node.input:
            node.input[list(node.input).index(start.output[0])] = moved


@pytest.mark.parametrize(
    ("wrong", "place"), [(0, "span of sides"), (1, "pixel")], ids=["sides", "positions"]
)
def test_a_sampler_that_is_a_little_off_is_seen(road, loaded, tmp_path, wrong, place):
    """Rounding hides both but near a step: s_max - s_min, and the 1 of u (free + 1), 5 % larger."""
    bundle = copied(road.bundle, "onnx", tmp_path)
    model = loaded("onnx/patch_sampler.onnx")
    graph = Graph(model.graph)
    right = open_sampler(open_bundle(bundle), "onnx")
    if wrong == 0:
        growth = graph.node("Mul", "sigma")
        growth.input[1] = graph.constant(1.05 * (road.plan.s_max - road.plan.s_min))
    else:
        free = graph.after(graph.after(graph.node("Slice", "uv"), "Mul"), "Floor").input[0]
        added = graph.before(graph.before(free).input[1])
        added.input[1] = graph.constant(1.05)
    onnx.save(model, bundle / "onnx" / "patch_sampler.onnx")
    plan = road.plan.shared()
    want = patches(right, plan)
    found = patches(open_sampler(open_bundle(bundle), "onnx"), plan)
    assert not result_of(want, found, "onnx").passed, place


@pytest.mark.parametrize("target", ["onnx", "ort-training"])
def test_an_off_by_one_crop_is_seen(road, loaded, tmp_path, target):
    model = loaded(f"{target}/patch_sampler.onnx")
    off_by_one_crop(Graph(model.graph))
    bundle = tmp_path / "bundle"
    shutil.copytree(road.bundle, bundle)
    onnx.save(model, bundle / target / "patch_sampler.onnx")
    result = verify(bundle, road.bank, steps=1, targets=[target]).targets[target]
    assert not result.passed
    assert {row.kind for row in result.failed} == {"patch"}
    assert result.worst["patch"].max > 1e-2
