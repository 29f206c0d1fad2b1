"""Parity: does every target compute what PyTorch computes?

Each target runs in a process of its own (a bad program may abort it) and does what the reference
does: gradients of one draw with a LoRA B that is not zero, then a training trajectory from the
initial adapter. The certificate, parity.json, holds the differences and the tolerances.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_dit.adapter import read_adapter
from edge_dit.bank import Bank
from edge_dit.bundle import ADAPTER, MANIFEST, Manifest, read_manifest
from edge_dit.errors import require
from edge_dit.files import sha256, write_json
from edge_dit.progress import bar
from edge_dit_runtime.session import Trainer, open_session
from edge_dit_runtime.train import draw_order

PARITY = "parity.json"
TOLERANCES = {
    "onnx": {"loss": 1e-4, "gradients": 1e-4, "trajectory": 1e-4, "adapter": 1e-3},
    "ort-training": {"loss": 1e-4, "gradients": 1e-4, "trajectory": 1e-4, "adapter": 1e-3},
    "executorch": {"loss": 1e-3, "gradients": 1e-3, "trajectory": 1e-3, "adapter": 1e-3},
}
"""Largest difference over the largest value of the reference tensor, float32."""
B_STD = 0.02
"""Spread of the random LoRA B under which gradients are compared. At the initial B = 0 every
gradient of A is zero and would prove nothing."""


def measure(session: Trainer, bank: Bank, adapter: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What parity compares, as flat tensors: "loss", "gradients.<name>", "trajectory",
    "adapter.<name>". The session's adapter and optimiser state are used up.
    """
    rng = np.random.default_rng(0)
    perturbed = {
        name: rng.normal(0, B_STD, value.shape).astype(np.float32) if ".lora_B." in name else value
        for name, value in adapter.items()
    }
    session.load_adapter(perturbed)
    found: dict[str, Any] = {"loss": np.float64(session.backward(bank[0]))}
    found |= {f"gradients.{name}": value for name, value in session.gradients().items()}
    session.load_adapter(adapter)
    losses = [session.step(bank[draw_order(i, len(bank), 0)]) for i in range(steps)]
    found["trajectory"] = np.array(losses)
    found |= {f"adapter.{name}": value for name, value in session.adapter().items()}
    return {name: np.atleast_1d(value) for name, value in found.items()}


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
    from edge_dit.adamw import AdamW
    from edge_dit.plan import Plan
    from edge_dit.reference import EagerSession, adapted_subgraph

    manifest = read_manifest(bundle)
    bank = Bank(bank_folder, manifest.plan_hash)
    adapter = read_adapter(bundle / ADAPTER)[0]
    chosen = targets or list(manifest.targets)
    results: dict[str, Any] = {}
    with bar("verify", len(chosen) + 1) as advance:
        subgraph, _ = adapted_subgraph(Plan.model_validate(manifest.plan))
        adamw = AdamW(**manifest.optimizer.model_dump())
        reference = measure(EagerSession(subgraph, adamw), bank, adapter, steps)
        advance(note="reference")
        for target in chosen:
            results[target] = _verify_target(bundle, bank_folder, target, steps, reference)
            advance(note=target)
    import torch

    certificate = {
        "schema_version": 1,
        "passed": all(result["passed"] for result in results.values()),
        "manifest_sha256": sha256(bundle / MANIFEST),
        "reference": f"torch {torch.__version__} eager, float32",
        "steps": steps,
        "targets": results,
    }
    write_json(bundle / PARITY, certificate)
    return certificate


def _verify_target(
    bundle: Path, bank: Path, target: str, steps: int, reference: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.safetensors"
        command = [sys.executable, "-m", "edge_dit_runtime.verify"]
        command += [str(bundle), str(bank), target, str(steps), str(out)]
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


def child(bundle: Path, bank_folder: Path, target: str, steps: int, out: Path) -> None:
    """Measure one target and store the tensors; runs in a process of its own."""
    manifest: Manifest = read_manifest(bundle)
    bank = Bank(bank_folder, manifest.plan_hash)
    session = open_session(bundle, manifest, target)
    found = measure(session, bank, read_adapter(bundle / ADAPTER)[0], steps)
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, out)


def read_certificate(bundle: Path) -> dict[str, Any] | None:
    """The bundle's certificate, or None when there is none or it is of another manifest."""
    try:
        certificate = json.loads((bundle / PARITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = certificate.get("manifest_sha256") == sha256(bundle / MANIFEST)
    return certificate if fits else None


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
