"""Exports the tiny sub-graph to ExecuTorch and checks what the programs compute.

Run by test_executorch.py in a process of its own, because ExecuTorch can abort a whole process:

    python executorch_child.py FOLDER      writes the bundle and results.json there

results.json: for every check, null or the traceback of its failure.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import bundles
import tiny
from edge_dit.adapter import write_adapter
from edge_dit.bundle import ADAPTER, Manifest, Optimizer, TensorSpec
from edge_dit.pipeline import quiet
from edge_dit.sampler import crop_at

MAX_IMAGE_SIDE = 160


def write(folder: Path) -> Manifest:
    """A bundle with the executorch target alone."""
    from edge_dit_export.executorch_target import export_executorch
    from edge_dit_export.optimizer import AdamWStep

    sub, batch, step = tiny.traced()
    lora = {name: p.detach().numpy() for name, p in sub.lora_parameters().items()}
    (folder / "executorch").mkdir()
    optimizer = AdamWStep(bundles.ADAMW, {name: value.shape for name, value in lora.items()})
    facts = export_executorch(
        step, optimizer, bundles.SAMPLER, folder / "executorch", MAX_IMAGE_SIDE
    )
    write_adapter(folder / ADAPTER, lora, rank=4, alpha=8.0)
    return Manifest(
        family="sana",
        plan={},
        plan_hash="",
        tensors=[
            *(TensorSpec(name=n, shape=tuple(t.shape), role="batch") for n, t in batch.items()),
            *(TensorSpec(name=n, shape=t.shape, role="lora") for n, t in lora.items()),
        ],
        optimizer=Optimizer(**asdict(bundles.ADAMW)),
        targets={"executorch": facts},
        tools={},
        files=[],
    )


def session(folder: Path, manifest: Manifest):
    from edge_dit_runtime.executorch_session import executorch_session

    return executorch_session(folder, manifest)


def gradients(folder: Path, manifest: Manifest) -> None:
    """Two draws in turn: the second must not change what the first returned."""
    sub, batch = tiny.subgraph()
    opened = session(folder, manifest)
    kept = []
    for draw in bundles.draws(batch, 2):
        loss = torch.tensor(opened.backward(draw))
        found = {f"grad.{n}": torch.from_numpy(g) for n, g in opened.gradients().items()}
        eager = tiny.eager(sub, {name: torch.from_numpy(value) for name, value in draw.items()})
        kept.append((eager, {"loss": loss, **found}))
    for eager, found in kept:
        tiny.assert_close(eager, found, 1e-5)


def trajectory(folder: Path, manifest: Manifest) -> None:
    """Losses and adapter of 20 steps."""
    sub, batch = tiny.subgraph()
    bundles.assert_trains_like_torch(session(folder, manifest), sub, batch)


def resume(folder: Path, manifest: Manifest) -> None:
    """A run split in two is the run in one go."""
    _, batch = tiny.subgraph()
    bundles.assert_resumes_bit_for_bit(lambda: session(folder, manifest), batch)


def adapter(folder: Path, manifest: Manifest) -> None:
    """load_adapter changes what is trained, and the loss with it."""
    _, batch = tiny.subgraph()
    draw = bundles.draws(batch, 1)[0]
    opened = session(folder, manifest)
    loss = opened.backward(draw)
    doubled = {name: 2 * value for name, value in opened.adapter().items()}
    opened.load_adapter(doubled)
    for name, value in opened.adapter().items():
        np.testing.assert_array_equal(value, doubled[name], err_msg=name)
    assert opened.backward(draw) != loss


def optimizer(folder: Path, manifest: Manifest) -> None:
    """optimizer.pte against its module, late in a run, where the moments' bias hardly counts."""
    from edge_dit_export.optimizer import AdamWStep
    from edge_dit_runtime.executorch_session import ExecuTorchProgram

    shapes = {t.name: t.shape for t in manifest.tensors if t.role == "lora"}
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(s, generator=generator) for _ in range(4) for s in shapes.values()]
    state[3 * len(shapes) :] = [value.abs() for value in state[3 * len(shapes) :]]
    arguments = [torch.tensor([1e-3]), torch.tensor([900.0]), *state]
    found = ExecuTorchProgram(folder / "executorch" / "optimizer.pte")(
        *(a.numpy() for a in arguments)
    )
    for want, have in zip(AdamWStep(bundles.ADAMW, shapes)(*arguments), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=1e-6, atol=1e-7)


def sampler(folder: Path, manifest: Manifest) -> None:
    """patch_sampler.pte against torch's antialiased resize, images of many sizes."""
    from edge_dit_runtime.executorch_session import ExecuTorchProgram

    program = ExecuTorchProgram(folder / "executorch" / "patch_sampler.pte")
    rng = np.random.default_rng(0)
    settings = bundles.SAMPLER.s_min, bundles.SAMPLER.s_max, bundles.SAMPLER.multiple
    sides = rng.integers(settings[1], MAX_IMAGE_SIDE, (100, 2), endpoint=True)
    for height, width in [*sides, (settings[1],) * 2, (MAX_IMAGE_SIDE,) * 2]:
        image = rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        sigma, u, v = rng.uniform(0, 1, 3).astype(np.float32)
        (patch,) = program(image, sigma[None], np.array([u, v]))
        crop = crop_at(sigma, u, v, int(height), int(width), *settings)
        rows, columns = (slice(start, start + crop.side) for start in (crop.top, crop.left))
        want = torch.nn.functional.interpolate(
            torch.from_numpy(image[:, :, rows, columns]),
            size=(settings[0],) * 2,
            mode="bilinear",
            antialias=True,
        )
        torch.testing.assert_close(torch.from_numpy(patch), want, rtol=0, atol=1e-5)


def bad_file(folder: Path, manifest: Manifest) -> None:
    """What is no program is refused with the file's name."""
    from edge_dit.errors import BadInput
    from edge_dit_runtime.executorch_session import ExecuTorchProgram

    path = folder / "broken.pte"
    path.write_bytes(bytes(2048))
    with pytest.raises(BadInput, match=r"broken\.pte"):
        ExecuTorchProgram(path)


def every_frozen_layer_is_delegated(folder: Path, manifest: Manifest) -> None:
    """Forward: 8 attention layers, 2 feed-forward products and a depthwise convolution in both
    blocks, and proj_out. Backward: the same, except that no gradient goes into the text (attn2's
    to_k and to_v), nor out of the first trained block (its attn1's to_q, to_k and to_v).
    """
    programs = manifest.targets["executorch"]["programs"]
    assert programs["train.pte"]["delegated"] == (2 * 11 + 1) * 2 - 2 * 2 - 3


CHECKS = (
    gradients,
    trajectory,
    resume,
    adapter,
    optimizer,
    sampler,
    bad_file,
    every_frozen_layer_is_delegated,
)


def main(folder: Path) -> None:
    with quiet():
        import executorch.exir  # noqa: F401 - torchao, which it imports, warns
    warnings.simplefilter("error")
    manifest = write(folder)
    results: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            check(folder, manifest)
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
