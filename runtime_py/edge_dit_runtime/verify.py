"""Parity: does every target compute what PyTorch computes?

Each target runs in a process of its own (a bad program may abort it) and does what the reference
does: gradients of one draw with a LoRA B that is not zero, then a training trajectory from the
initial adapter, then a few patches of a random image. The certificate, parity.json, holds the
differences and the tolerances.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_dit.adapter import read_adapter
from edge_dit.bank import Bank
from edge_dit.bundle import ADAPTER, MANIFEST, Manifest, read_manifest
from edge_dit.certificate import PARITY
from edge_dit.errors import CheckFailed, require
from edge_dit.files import sha256, write_json
from edge_dit.integrity import check_confined, content_faults
from edge_dit.progress import bar
from edge_dit_runtime.session import Trainer, layouts, open_session, titled
from edge_dit_runtime.train import draw_order

_ONNX = {"loss": 1e-4, "gradients": 1e-4, "trajectory": 1e-4, "adapter": 1e-3, "patch": 1e-5}
TOLERANCES = {
    "onnx": _ONNX,
    "ort-training": _ONNX,
    "executorch": {**dict.fromkeys(_ONNX, 1e-3), "patch": 1e-5},
}
"""Largest difference over the largest value of the reference tensor, float32."""
B_STD = 0.02
"""Spread of the random LoRA B under which gradients are compared. At the initial B = 0 every
gradient of A is zero and would prove nothing."""


PATCHES = ((0.0, 0.2, 0.9), (0.37, 0.6, 0.1), (0.83, 1.0, 0.0), (1.0, 0.5, 0.5))
"""(sigma, u, v) of the patches that are compared."""
WIDE = "float32"
NUDGE = 2e-6
"""Relative size of the nudge of `is_well_posed`: just above what float32 rounding does."""


def measure(
    session: Trainer, bank: Bank, adapter: Mapping[str, Any], draws: list[int]
) -> dict[str, Any]:
    """What parity compares, as flat tensors: "loss", "gradients.<name>", "trajectory",
    "adapter.<name>". The session's adapter and optimiser state are used up.

    Args:
        session: freshly opened.
        bank: of the bundle.
        adapter: the initial adapter.
        draws: the draw whose gradients are compared, then those of the trajectory.
    """
    session.load_adapter(perturbed(adapter))
    found: dict[str, Any] = {"loss": np.float64(session.backward(bank[draws[0]]))}
    found |= {f"gradients.{name}": value for name, value in session.gradients().items()}
    session.load_adapter(adapter)
    found["trajectory"] = np.array([session.step(bank[number]) for number in draws[1:]])
    found |= {f"adapter.{name}": value for name, value in session.adapter().items()}
    return {name: np.atleast_1d(value) for name, value in found.items()}


def patches(sampler: Callable[..., Any], s_max: int) -> dict[str, np.ndarray]:
    """Patches of a random image, by "patch.<number>".

    Args:
        sampler: image, sigma and uv -> patch, see `edge_dit.patch_sampler.PatchSampler.forward`.
        s_max: of the plan, pixels.
    """
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, 3, s_max + 9, s_max + 5)).astype(np.float32)
    found = {}
    for number, (sigma, u, v) in enumerate(PATCHES):
        arguments = (np.array([sigma], np.float32), np.array([u, v], np.float32))
        found[f"patch.{number}"] = np.asarray(sampler(image, *arguments))
    return found


def _exported_sampler(bundle: Path, target: str) -> Callable[..., Any]:
    if target == "executorch":
        from edge_dit_runtime.executorch_session import ExecuTorchProgram

        program: Any = ExecuTorchProgram(bundle / target / "patch_sampler.pte")
    else:
        from edge_dit_runtime.onnx_session import OnnxProgram

        path = bundle / target / "patch_sampler.onnx"
        program = OnnxProgram(path, ["image", "sigma", "uv"], ["patch"])
    return lambda *arguments: program(*arguments)[0]


def perturbed(adapter: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter with a random B; the same at every call."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, B_STD, value.shape).astype(np.float32) if ".lora_B." in name else value
        for name, value in adapter.items()
    }


def choose_draws(
    session: Trainer, bank: Bank, adapter: Mapping[str, np.ndarray], steps: int
) -> list[int]:
    """1 + ``steps`` draws that can decide parity, found along PyTorch's own trajectory.

    Raises:
        CheckFailed: hardly any draw can.
    """
    candidates = iter([draw_order(i, len(bank), 0) for i in range(10 * (steps + 1))])
    chosen: list[int] = []
    session.load_adapter(perturbed(adapter))
    for number in candidates:
        if not is_well_posed(session, bank[number]):
            continue
        chosen.append(number)
        if len(chosen) == 1:
            session.load_adapter(adapter)
        else:
            session.step(bank[number])
        if len(chosen) == steps + 1:
            return chosen
    raise CheckFailed("PyTorch's own gradients are too sensitive to rounding to compare anything")


def is_well_posed(session: Trainer, draw: Mapping[str, np.ndarray]) -> bool:
    """Whether a nudge of the entry state by `NUDGE` leaves the gradients within tolerance.

    SANA's linear attention has a ReLU, whose gradient jumps at 0. Where a value lies that close to
    it, rounding alone decides the gradient, and AdamW turns the difference into whole steps: such a
    draw says nothing of an export.
    """
    session.backward(draw)
    reference = session.gradients()
    nudge = NUDGE * np.random.default_rng(0).choice([-1.0, 1.0], draw["entry"].shape)
    for sign in (1, -1):
        entry = (draw["entry"] * (1 + sign * nudge)).astype(np.float32)
        session.backward({**draw, "entry": entry})
        for name, value in session.gradients().items():
            limit = TOLERANCES["onnx"]["gradients"] * np.abs(reference[name]).max()
            if np.abs(value - reference[name]).max() > limit:
                return False
    return True


def compare(
    reference: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    tolerances: dict[str, float],
) -> dict[str, Any]:
    """Per tensor: largest and mean absolute difference, cosine, and the largest difference over the
    reference's largest value; the worst tensor of each kind; passed or not.
    """
    rows = [_difference(name, reference[name], found.get(name)) for name in reference]
    worst: dict[str, Any] = {}
    for row in rows:
        kind = row["kind"]
        row["tolerance"] = tolerances[kind]
        row["passed"] = bool(row["relative"] <= tolerances[kind])
        if kind not in worst or not row["relative"] <= worst[kind]["relative"]:
            worst[kind] = row
    failed = [row for row in rows if not row["passed"]]
    return {
        "passed": not failed,
        "worst": worst,
        "failed": sorted(failed, key=lambda row: -_finite(row["relative"] / row["tolerance"])),
        "tensors": rows,
    }


def _finite(value: float) -> float:
    return value if np.isfinite(value) else np.inf


def _difference(name: str, want: np.ndarray, have: np.ndarray | None) -> dict[str, Any]:
    kind = name.partition(".")[0]
    if have is None or have.shape != want.shape:
        nothing = {"max": np.inf, "mean": np.inf, "cosine": 0.0, "relative": np.inf}
        return {"name": name, "kind": kind, **nothing}
    want, have = want.astype(np.float64).ravel(), have.astype(np.float64).ravel()
    error = np.abs(want - have)
    if kind == "trajectory":
        relative = float((error / np.abs(want)).max())  # each step's loss against its own size
    else:
        scale = np.abs(want).max()
        relative = float(error.max() / scale) if scale > 0 else float(error.max())
    norms = np.linalg.norm(want) * np.linalg.norm(have)
    return {
        "name": name,
        "kind": kind,
        "max": float(error.max()),
        "mean": float(error.mean()),
        "cosine": float(want @ have / norms) if norms > 0 else 1.0,
        "relative": relative if np.isfinite(have).all() else float("inf"),
    }


def verify(
    bundle: Path, bank_folder: Path, steps: int = 20, targets: list[str] | None = None
) -> dict[str, Any]:
    """Compare every target of a bundle with PyTorch and write the certificate.

    Every file is hashed: a bundle with files that are not those of its manifest does not pass.

    Args:
        bundle: an exported bundle; parity.json is written into it.
        bank_folder: its bank.
        steps: length of the training trajectory.
        targets: some of the bundle's targets; default all.

    Returns:
        The certificate.

    Raises:
        BadInput: bundle and bank do not fit, the model is gone, or torch is missing.
    """
    require("torch", "the PyTorch reference of verify")
    import torch

    from edge_dit.adamw import AdamW
    from edge_dit.patch_sampler import PatchSampler
    from edge_dit.plan import Plan
    from edge_dit.quantize import round_frozen
    from edge_dit.reference import EagerSession, adapted_subgraph

    manifest = read_manifest(bundle)
    plan = Plan.model_validate(manifest.plan)
    host = PatchSampler(plan.s_min, plan.s_max, plan.multiple)
    bank = Bank(bank_folder, manifest.plan_hash)
    adapter = read_adapter(bundle / ADAPTER)[0]
    # Targets with frozen weights in fewer bytes come last: PyTorch's are rounded to theirs then.
    chosen = sorted(targets or manifest.targets, key=lambda name: _weights(manifest, name) != WIDE)
    changed = {
        fault.where: fault.found
        for target in chosen
        for fault in content_faults(bundle, manifest, target, verify_hashes=True)
    }

    def sampler(*arrays: np.ndarray) -> np.ndarray:
        return host(*map(torch.from_numpy, arrays)).numpy()

    rows = [(target, layout) for target in chosen for layout in layouts(manifest, target)]
    results: dict[str, Any] = {}
    references: dict[str, Any] = {}
    with bar("verify", len(rows) + 1) as advance:
        subgraph, _ = adapted_subgraph(plan)
        adamw = AdamW(**manifest.optimizer.model_dump())
        draws = choose_draws(EagerSession(subgraph, adamw), bank, adapter, steps)
        advance(note="reference")
        for target, layout in rows:
            dtype = _weights(manifest, target)
            if dtype not in references:
                round_frozen(subgraph, dtype)
                found = measure(EagerSession(subgraph, adamw), bank, adapter, draws)
                references[dtype] = found | patches(sampler, plan.s_max)
            name = titled(manifest, target, layout)
            results[name] = _verify_target(
                bundle, bank_folder, target, layout, draws, references[dtype]
            )
            advance(note=name)
    certificate = {
        "schema_version": 1,
        "passed": not changed and all(result["passed"] for result in results.values()),
        "changed_files": [f"{where} ({found})" for where, found in changed.items()],
        "manifest_sha256": sha256(bundle / MANIFEST),
        "reference": f"torch {torch.__version__} eager, float32",
        "steps": steps,
        "draws": draws,
        "targets": results,
    }
    write_json(bundle / PARITY, certificate)
    return certificate


def _weights(manifest: Manifest, target: str) -> str:
    """How a target stores frozen matrices."""
    return str(manifest.targets[target].get("weights", WIDE))


def _verify_target(
    bundle: Path,
    bank: Path,
    target: str,
    layout: str,
    draws: list[int],
    reference: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.safetensors"
        command = [sys.executable, "-m", "edge_dit_runtime.verify"]
        command += [str(bundle), str(bank), target, layout, json.dumps(draws), str(out)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode != 0 or not out.is_file():
            why = child.stderr.strip().splitlines()[-1:] or ["no message"]
            return {
                "passed": False,
                "error": f"the process ended with code {child.returncode}: {why[0]}",
                "tolerances": TOLERANCES[target],
            }
        found = load_file(out)
    result = compare(reference, found, TOLERANCES[target])
    return {**result, "tolerances": TOLERANCES[target]}


def child(
    bundle: Path, bank_folder: Path, target: str, layout: str, draws: list[int], out: Path
) -> None:
    """Measure one target and store the tensors; runs in a process of its own."""
    manifest: Manifest = read_manifest(bundle)
    bank = Bank(bank_folder, manifest.plan_hash)
    check_confined(bundle, target)
    session = open_session(bundle, manifest, target, layout)
    found = measure(session, bank, read_adapter(bundle / ADAPTER)[0], draws)
    del session
    found |= patches(_exported_sampler(bundle, target), manifest.plan["s_max"])
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, out)


if __name__ == "__main__":
    _bundle, _bank, _target, _layout, _draws, _out = sys.argv[1:]
    child(Path(_bundle), Path(_bank), _target, _layout, json.loads(_draws), Path(_out))
