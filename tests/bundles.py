"""Bundles of the tiny sub-graph with a manifest made by hand, and what they are compared with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnxruntime
import torch
from safetensors.numpy import save_file
from torch import Tensor

import tiny
from edge_dit.adamw import AdamW
from edge_dit.adapter import write_adapter
from edge_dit.bundle import ADAPTER, MANIFEST, Manifest, Optimizer, TensorSpec
from edge_dit.patch_sampler import PatchSampler
from edge_dit.sampler import crop_at
from edge_dit.subgraph import TrainableSubgraph

ADAMW = AdamW(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5)
"""Clips: the tiny sub-graph's gradient norms are above 0.5."""
SAMPLER = PatchSampler(16, 48, 8)


def write(folder: Path, target: str) -> tuple[TrainableSubgraph, dict[str, Tensor], Manifest]:
    """A bundle with one target; also the sub-graph and draw it was made from."""
    from edge_dit_export.onnx_target import export_onnx
    from edge_dit_export.optimizer import AdamWStep
    from edge_dit_export.ort_training_target import export_ort_training
    from edge_dit_export.train_step import trace_train_step

    sub, batch = tiny.subgraph()
    lora = {name: p.detach().numpy() for name, p in sub.lora_parameters().items()}
    directory = folder / target
    directory.mkdir(parents=True)
    if target == "onnx":
        step = trace_train_step(sub, batch)
        optimizer = AdamWStep(ADAMW, {name: value.shape for name, value in lora.items()})
        facts = export_onnx(step, optimizer, SAMPLER, directory)
    else:
        facts = export_ort_training(sub, batch, ADAMW, SAMPLER, directory)
    write_adapter(folder / ADAPTER, lora, rank=4, alpha=8.0)
    manifest = Manifest(
        family="sana",
        plan={},
        plan_hash="",
        tensors=[
            *(TensorSpec(name=n, shape=tuple(t.shape), role="batch") for n, t in batch.items()),
            *(TensorSpec(name=n, shape=t.shape, role="lora") for n, t in lora.items()),
        ],
        optimizer=Optimizer(**asdict(ADAMW)),
        targets={target: facts},
        tools={},
        files=[],
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return sub, batch, manifest


def draws(batch: dict[str, Tensor], count: int) -> list[dict[str, np.ndarray]]:
    """``count`` draws like ``batch``, each with an entry, tail residual and target of its own."""
    generator = torch.Generator().manual_seed(2)
    varied = ("entry", "tail_residual", "target")
    return [
        {
            name: (value + torch.randn(value.shape, generator=generator)).numpy()
            if name in varied
            else value.numpy()
            for name, value in batch.items()
        }
        for _ in range(count)
    ]


def train_eagerly(
    sub: TrainableSubgraph, draws: list[dict[str, np.ndarray]]
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and final adapter of PyTorch with `ADAMW`; the sub-graph is trained in place."""
    parameters = sub.lora_parameters()
    optimizer = torch.optim.AdamW(
        parameters.values(),
        ADAMW.lr,
        (ADAMW.beta1, ADAMW.beta2),
        ADAMW.eps,
        ADAMW.weight_decay,
    )
    losses = []
    for draw in draws:
        optimizer.zero_grad()
        loss = sub({name: torch.from_numpy(value) for name, value in draw.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), ADAMW.max_grad_norm)
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
    from edge_dit.bundle import read_manifest
    from edge_dit_runtime.session import open_session

    bundle, target = Path(sys.argv[1]), sys.argv[2]
    session = open_session(bundle, read_manifest(bundle), target)
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
    s_min, s_max, multiple = SAMPLER.s_min, SAMPLER.s_max, SAMPLER.multiple
    for _ in range(100):
        height, width = map(int, rng.integers(s_max, 3 * s_max, 2))
        image = rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        sigma, u, v = rng.uniform(0, 1, 3).astype(np.float32)
        feeds = {"image": image, "sigma": sigma[None], "uv": np.array([u, v])}
        patch = torch.from_numpy(session.run(None, feeds)[0])
        crop = crop_at(sigma, u, v, height, width, s_min, s_max, multiple)
        rows, columns = (slice(start, start + crop.side) for start in (crop.top, crop.left))
        want = torch.nn.functional.interpolate(
            torch.from_numpy(image[:, :, rows, columns]),
            size=(s_min, s_min),
            mode="bilinear",
            antialias=True,
        )
        torch.testing.assert_close(patch, want, rtol=0, atol=1e-5)


def assert_trains_like_torch(session, sub, batch) -> None:
    """Gradients of one draw, then losses and adapter of 20 steps, against PyTorch."""
    many = draws(batch, 20)
    eager = tiny.eager(sub, {name: torch.from_numpy(value) for name, value in many[0].items()})
    found = {"loss": torch.tensor(session.backward(many[0]))}
    found |= {f"grad.{n}": torch.from_numpy(g) for n, g in session.gradients().items()}
    tiny.assert_close(eager, found, 1e-5)

    want_losses, want_adapter = train_eagerly(sub, many)
    losses = [session.step(draw) for draw in many]
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    adapter = {n: torch.from_numpy(v) for n, v in session.adapter().items()}
    tiny.assert_close({n: torch.from_numpy(v) for n, v in want_adapter.items()}, adapter, 1e-4)


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
