"""Bundles of small sub-graphs with a manifest made by hand, and what they are compared with."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.numpy import save_file
from torch import Tensor

import tiny
import variants
from edge_dit.contract.adamw import AdamW
from edge_dit.contract.adapter import write_adapter
from edge_dit.contract.bundle import (
    ADAPTER,
    Bundle,
    Manifest,
    TensorSpec,
    open_bundle,
    write_manifest,
)
from edge_dit.contract.names import STORED, Tail
from edge_dit.contract.targets import FROZEN, TARGETS, StreamedFacts
from edge_dit.models.quantize import matrices
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit.pictures.crop import CropRule

ADAMW = AdamW(lr=1e-3, weight_decay=0.1, max_grad_norm=0.2, loraplus_lr_ratio=4.0)
"""Clips: the tiny sub-graph's gradient norms are above 0.2."""
LEAN = replace(ADAMW, beta1=0.0)
"""Keeps no first moment."""
CROPS = CropRule(s_min=16, s_max=48, multiple=8)
EXECUTORCH_CHILD = Path(__file__).with_name("executorch_child.py")
MAX_IMAGE_SIDE = 4 * CROPS.s_max
"""Largest image side that ExecuTorch's patch sampler is made for."""
Made = tuple[TrainableSubgraph, dict[str, Tensor]]
"""A sub-graph with LoRA, and one draw for it."""


MASKED = ("flux-dev", "pixart-sigma")
"""Variants whose draws have a mask: one of a family whose target is tokens, one of latents. All
targets are tested with both.
"""


def made_variant(variant: str, split: str, targets: str = "own", tail: Tail = STORED) -> Made:
    """Of `variants`; SD3, which weighs draws, with a weight.

    Args:
        variant: one of `variants.VARIANTS`.
        split: one of `variants.SPLITS`.
        targets: LoRA where the family puts it ("own"), or on every module that can carry it
            ("all").
        tail: what takes the place of the blocks after the last trained one.
    """
    made = variants.case(variant)
    trained = variants.SPLITS[split]
    variants.with_lora(made, trained, targets == "all", tail)
    weight = 0.3 if made.family.name == "sd3" else None
    if variant in MASKED:
        weight = variants.mask(made)
    return variants.subgraph(made, trained, weight, tail)


def write(
    folder: Path, *targets: str, made: Made | None = None, adamw: AdamW = ADAMW
) -> tuple[*Made, Bundle]:
    """A bundle with some targets; also the sub-graph and draw it was made from.

    Args:
        folder: where it goes.
        targets: what to export; "executorch" in a process of its own only.
        made: what to export, by default `tiny.subgraph`.
        adamw: hyper-parameters of the optimizer.
    """
    sub, batch = made or tiny.subgraph()
    lora = {name: p.detach().numpy() for name, p in sub.lora_parameters().items()}
    facts = _export(folder, targets, (sub, batch), adamw)
    write_adapter(folder / ADAPTER, lora, rank=4, alpha=8.0)
    manifest = Manifest(
        family=sub.family.name,
        plan={},
        plan_hash="",
        tensors=[
            *(TensorSpec(name=n, shape=tuple(t.shape), role="batch") for n, t in batch.items()),
            *(TensorSpec(name=n, shape=t.shape, role="lora") for n, t in lora.items()),
        ],
        optimizer=adamw,
        targets=facts,
        tools={},
        files=[],
    )
    return sub, batch, write_manifest(folder, manifest)


def with_plan(bundle: Path, folder: Path, **keys: Any) -> Path:
    """A copy of a bundle in ``folder``, whose plan has other values. No links: onnx's checker takes
    no external data that has two names.
    """
    shutil.copytree(bundle, folder)
    manifest = open_bundle(bundle).manifest
    write_manifest(folder, manifest.model_copy(update={"plan": {**manifest.plan, **keys}}))
    return folder


class FakeManifest:
    """What `StreamedStep` reads of a manifest."""

    def __init__(self, batch, lora):
        self._names = {"batch": list(batch), "lora": list(lora)}

    def names(self, role):
        return self._names[role]


def streamed(folder: Path, made: Made, dtype: str) -> dict[str, Any]:
    """Write the streamed layout alone into ``folder``/onnx; its facts."""
    from edge_dit_export.graph.blocks import frozen_tensors, plain_name
    from edge_dit_export.targets.frozen import FrozenStore
    from edge_dit_export.targets.streamed import export_streamed

    sub, batch = made
    (folder / "onnx").mkdir()
    store = FrozenStore(frozen_tensors(sub), dict.fromkeys(map(plain_name, matrices(sub)), dtype))
    facts = export_streamed(sub, batch, store, folder / "onnx")
    store.write(folder / "onnx")
    return facts


def streamed_gradients(folder: Path, made: Made, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients by the layout that `streamed` wrote, named like a train step's outputs."""
    from edge_dit_runtime.sessions.mapped import MappedTensors
    from edge_dit_runtime.sessions.streamed import StreamedStep

    sub, batch = made
    lora = {name: p.detach() for name, p in sub.lora_parameters().items()}
    frozen = MappedTensors(folder / "onnx" / FROZEN)
    step = StreamedStep(FakeManifest(batch, lora), StreamedFacts(**facts), folder / "onnx", frozen)
    loss, *gradients = step(*(t.numpy() for t in [*batch.values(), *lora.values()]))
    named = {f"grad.{n}": torch.from_numpy(g) for n, g in zip(lora, gradients, strict=True)}
    return {"loss": torch.as_tensor(loss), **named}


def _export(
    folder: Path, targets: tuple[str, ...], made: Made, adamw: AdamW
) -> dict[str, dict[str, Any]]:
    """Write each target into its folder; facts of each."""
    from edge_dit_export.targets.source import Source

    source = Source(*made, adamw, CROPS, recompute=True)
    facts = {}
    for target in targets:
        directory = folder / target
        directory.mkdir(parents=True)
        module = import_module(f"edge_dit_export.targets.{TARGETS[target].module}")
        facts[target] = module.write(source, directory)
    return facts


def executorch_checks(kind: str) -> list[str]:
    """Names of the checks in a tuple of executorch_child.py: read, not imported, so that ExecuTorch
    stays out of this process.
    """
    return [
        ast.unparse(element)
        for node in ast.parse(EXECUTORCH_CHILD.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        if ast.unparse(node.targets[0]) == kind
        for element in node.value.elts
    ]


def run_executorch_child(folder: Path, *variant: str) -> dict[str, str | None]:
    """What executorch_child.py found: for every check null or a traceback; under "ending", how the
    process ended.
    """
    paths = (str(EXECUTORCH_CHILD.parent), os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, EXECUTORCH_CHILD, folder, *variant],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    path = folder / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {**found, "ending": f"exit code {done.returncode}\n{done.stderr[-4000:]}"}


def assert_passed(results: dict[str, str | None], check: str) -> None:
    """Fail with the check's traceback, or with how its process ended before it."""
    assert check in results, f"the process ended before this check: {results['ending']}"
    assert results[check] is None, results[check]


def draws(batch: dict[str, Tensor], count: int) -> list[dict[str, np.ndarray]]:
    """``count`` draws like ``batch``, each with an entry, tail residual, target and weight of its
    own.
    """
    generator = torch.Generator().manual_seed(2)
    varied = ("entry", "entry_text", "tail_residual", "target")
    scaled = ("weight",)

    def vary(name: str, value: Tensor) -> Tensor:
        if name in varied:
            return value + torch.randn(value.shape, generator=generator)
        return value * (0.5 + torch.rand(1, generator=generator)) if name in scaled else value

    return [
        {name: vary(name, value).numpy() for name, value in batch.items()} for _ in range(count)
    ]


def train_eagerly(
    sub: TrainableSubgraph, draws: list[dict[str, np.ndarray]], adamw: AdamW = ADAMW
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and final adapter of PyTorch with ``adamw``; the sub-graph is trained in place."""
    parameters = sub.lora_parameters()
    optimizer = _optimizer(parameters, adamw)
    losses = []
    for draw in draws:
        optimizer.zero_grad()
        loss = sub({name: torch.from_numpy(value) for name, value in draw.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), adamw.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().numpy().copy() for name, p in parameters.items()}


_TRAIN_WITHOUT_TORCH = """
    import sys
    from pathlib import Path

    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "onnx", "diffusers"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, NoTorch())
    from safetensors.numpy import load_file
    from edge_dit.contract.bundle import open_bundle
    from edge_dit_runtime.session import open_session

    bundle, target = Path(sys.argv[1]), sys.argv[2]
    session = open_session(open_bundle(bundle), target)
    draw = load_file(bundle / "draw.safetensors")
    print(*(session.step(draw) for _ in range(3)))
"""


def assert_trains_without_torch(session, folder: Path, target: str, batch) -> None:
    """A process that cannot import torch trains ``folder``, to the same bits as ``session``."""
    draw = draws(batch, 1)[0]
    save_file(draw, folder / "draw.safetensors")
    command = [sys.executable, "-c", dedent(_TRAIN_WITHOUT_TORCH), str(folder), target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [float(word) for word in done.stdout.split()] == [session.step(draw) for _ in range(3)]


def assert_samples_like_interpolate(path: Path) -> None:
    """patch_sampler.onnx against torch's antialiased resize of the host's crop."""
    session = onnxruntime.InferenceSession(path)
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = map(int, rng.integers(CROPS.s_max, 3 * CROPS.s_max, 2))
        image = rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        sigma, u, v = rng.uniform(0, 1, 3).astype(np.float32)
        feeds = {"image": image, "sigma": sigma[None], "uv": np.array([u, v])}
        patch = torch.from_numpy(session.run(None, feeds)[0])
        crop = CROPS.crop(sigma, u, v, height, width)
        rows, columns = (slice(start, start + crop.side) for start in (crop.top, crop.left))
        want = torch.nn.functional.interpolate(
            torch.from_numpy(image[:, :, rows, columns]),
            size=(CROPS.s_min, CROPS.s_min),
            mode="bilinear",
            antialias=True,
        )
        torch.testing.assert_close(patch, want, rtol=0, atol=1e-5)


def assert_trains_like_torch(session, sub, batch, adamw: AdamW = ADAMW) -> None:
    """Gradients of one draw, then losses and adapter of 20 steps, against PyTorch.

    ``sub`` is trained in place.
    """
    many = draws(batch, 20)
    eager = tiny.eager(sub, {name: torch.from_numpy(value) for name, value in many[0].items()})
    found = {"loss": torch.tensor(session.backward(many[0]))}
    found |= {f"grad.{n}": torch.from_numpy(g) for n, g in session.gradients().items()}
    tiny.assert_close(eager, found, 1e-5)

    want_losses, want_adapter = train_eagerly(sub, many, adamw)
    losses = [session.step(draw) for draw in many]
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    adapter = {n: torch.from_numpy(v) for n, v in session.adapter().items()}
    tiny.assert_close({n: torch.from_numpy(v) for n, v in want_adapter.items()}, adapter, 1e-4)


def assert_smooths_like_torch(session, sub, batch) -> None:
    """Adapter and its average after 12 draws, against PyTorch with batches of three.

    ``sub`` is trained in place.
    """
    from edge_dit_runtime.sessions.smoothed import SmoothedSession

    group, decay, many = 3, 0.35, draws(batch, 12)
    smooth = SmoothedSession(session, group, decay)
    losses = [smooth.step(draw) for draw in many]
    assert smooth.state_dict()["step"].tolist() == [4]
    groups = [many[first : first + group] for first in range(0, len(many), group)]
    wanted, adapters = _train_in_groups(sub, groups)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)

    mean = adapters[0]
    for updates, adapter in enumerate(adapters[1:], 1):
        # The first three decays are 2/11, 3/12 and 4/13; the last is held down to `decay`.
        kept = min(decay, (1 + updates) / (10 + updates))
        mean = {name: kept * mean[name] + (1 - kept) * value for name, value in adapter.items()}
    state = smooth.state_dict()
    trained = {name: torch.from_numpy(state[f"adapter.{name}"]) for name in mean}
    tiny.assert_close(adapters[-1], trained, 1e-4)
    found = {name: torch.from_numpy(value) for name, value in smooth.adapter().items()}
    tiny.assert_close(mean, found, 1e-4)
    assert any((found[name] != trained[name]).any() for name in found)


def _train_in_groups(
    sub: TrainableSubgraph, groups: list[list[dict[str, np.ndarray]]]
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Loss of every draw, and the adapter before and after every update with `ADAMW`."""
    parameters = sub.lora_parameters()
    optimizer = _optimizer(parameters, ADAMW)
    losses, adapters = [], [{name: p.detach().clone() for name, p in parameters.items()}]
    for group in groups:
        optimizer.zero_grad()
        each = [sub({n: torch.from_numpy(value) for n, value in draw.items()}) for draw in group]
        torch.stack(each).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), ADAMW.max_grad_norm)
        optimizer.step()
        losses += [loss.item() for loss in each]
        adapters.append({name: p.detach().clone() for name, p in parameters.items()})
    return losses, adapters


def _optimizer(parameters: dict[str, torch.nn.Parameter], adamw: AdamW) -> torch.optim.AdamW:
    """PyTorch's optimizer; rates are those of `ADAMW`."""
    rates = {name: ADAMW.lr * (4 if "lora_B" in name else 1) for name in parameters}
    return torch.optim.AdamW(
        [{"params": [p], "lr": rates[name]} for name, p in parameters.items()],
        ADAMW.lr,
        (adamw.beta1, adamw.beta2),
        adamw.eps,
        adamw.weight_decay,
    )


def assert_trains_without_a_first_moment(folder: Path, target: str) -> None:
    """Of a bundle with `LEAN`: it learns what PyTorch does, and half of the state is enough to go
    on.
    """
    from edge_dit_runtime.session import open_session

    sub, batch, opened = write(folder, target, adamw=LEAN)
    session = open_session(opened, target)
    assert_trains_like_torch(session, sub, batch, LEAN)
    state = session.state_dict()
    assert len(state) == 2 * len(sub.lora_parameters()) + 1
    assert not [name for name in state if name.startswith("exp_avg.")]
    assert_resumes_bit_for_bit(lambda: open_session(opened, target), batch)


def assert_resumes_bit_for_bit(open_session, batch) -> None:
    """10 steps in one go against 4, a new session from the saved state, and 6 more."""
    many = draws(batch, 10)
    whole = open_session()
    losses = [whole.step(draw) for draw in many]

    first = open_session()
    before = [first.step(draw) for draw in many[:4]]
    state = first.state_dict()
    assert state["step"].tolist() == [4]
    first.step(many[4])  # the state is a copy: going on must not change it
    second = open_session()
    second.load_state_dict(state)
    again = second.state_dict()
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    after = [second.step(draw) for draw in many[4:]]
    assert [*before, *after] == losses
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], value, err_msg=name)
