"""Parity: does every target compute what PyTorch computes?

Each target runs in a process of its own (a bad program may abort it) and does what the reference
does: gradients of one draw with a LoRA B that is not zero, then a training trajectory from the
initial adapter, then a few patches of a random image. Where PyTorch's own gradient jumps, both
first put the same few rows of LoRA B aside (`edge_dit.reference.kinks`). The certificate,
parity.json, holds the differences and the tolerances.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_dit.contract.adapter import Rows, read_adapter
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER, MANIFEST, Manifest, read_manifest
from edge_dit.contract.certificate import PARITY
from edge_dit.contract.integrity import check_confined, content_faults
from edge_dit.errors import CheckFailed, require
from edge_dit.progress import bar
from edge_dit.store.files import sha256, write_json
from edge_dit_runtime.session import layouts, open_session, titled
from edge_dit_runtime.sessions.trainer import Trainer
from edge_dit_runtime.train import draw_order

if TYPE_CHECKING:
    from edge_dit.reference.eager import EagerSession

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


@dataclass(frozen=True)
class Point:
    """One step of what parity compares.

    Attributes:
        draw: its number in the bank.
        rows: of the adapter, set before the step.
    """

    draw: int
    rows: Rows


def measure(
    session: Trainer, bank: Bank, adapter: Mapping[str, Any], points: list[Point]
) -> dict[str, Any]:
    """What parity compares, as flat tensors: "loss", "gradients.<name>", "trajectory",
    "adapter.<name>". The session's adapter and optimiser state are used up.

    Args:
        session: freshly opened.
        bank: of the bundle.
        adapter: the initial adapter.
        points: that whose gradients are compared, then those of the trajectory.
    """
    first, *trajectory = points
    session.load_adapter(perturbed(adapter))
    _set_rows(session, first.rows)
    found: dict[str, Any] = {"loss": np.float64(session.backward(bank[first.draw]))}
    found |= {f"gradients.{name}": value for name, value in session.gradients().items()}
    session.load_adapter(adapter)
    losses = []
    for point in trajectory:
        _set_rows(session, point.rows)
        losses.append(session.step(bank[point.draw]))
    found["trajectory"] = np.array(losses)
    found |= {f"adapter.{name}": value for name, value in session.adapter().items()}
    return {name: np.atleast_1d(value) for name, value in found.items()}


def _set_rows(session: Trainer, rows: Rows) -> None:
    if not rows:
        return
    adapter = session.adapter()
    for name, (numbers, values) in rows.items():
        adapter[name][numbers] = values
    session.load_adapter(adapter)


def patches(sampler: Callable[..., Any], s_max: int) -> dict[str, np.ndarray]:
    """Patches of a random image, by "patch.<number>".

    Args:
        sampler: image, sigma and uv -> patch, see
            `edge_dit.pictures.patch_sampler.PatchSampler.forward`.
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
        from edge_dit_runtime.sessions.executorch import ExecuTorchProgram

        program: Any = ExecuTorchProgram(bundle / target / "patch_sampler.pte")
    else:
        from edge_dit_runtime.sessions.onnx import OnnxProgram

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


def choose_points(
    session: EagerSession, bank: Bank, adapter: Mapping[str, np.ndarray], steps: int
) -> list[Point]:
    """1 + ``steps`` points along PyTorch's own trajectory at which gradients do not jump.

    Args:
        session: PyTorch's; its adapter and optimiser state are used up.
        bank: of the bundle.
        adapter: the initial adapter.
        steps: length of the trajectory.

    Raises:
        CheckFailed: hardly any draw has one.
    """
    from edge_dit.reference.kinks import nudge_from_kinks

    points: list[Point] = []
    session.load_adapter(perturbed(adapter))
    for number in (draw_order(i, len(bank), 0) for i in range(10 * (steps + 1))):
        rows = nudge_from_kinks(session.subgraph, bank[number])
        if rows is None and not is_well_posed(session, bank[number]):
            continue
        points.append(Point(number, rows or {}))
        if len(points) == 1:
            session.load_adapter(adapter)
        else:
            session.step(bank[number])
        if len(points) == steps + 1:
            return points
    raise CheckFailed(
        "PyTorch's own gradients are too sensitive to rounding to compare anything; LoRA on "
        f"{' and '.join(session.subgraph.family.before_relu)} would let verify avoid that"
    )


def is_well_posed(session: Trainer, draw: Mapping[str, np.ndarray]) -> bool:
    """Whether a nudge of the entry state by `NUDGE` leaves the gradients within tolerance.

    Where it does not, rounding decides them, and AdamW turns the difference into whole steps: such
    a draw says nothing of an export.
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


def _write_points(path: Path, points: list[Point]) -> None:
    tensors = {"draws": np.array([point.draw for point in points], np.int64)}
    for step, point in enumerate(points):
        for name, (numbers, values) in point.rows.items():
            tensors |= {f"{step}.numbers.{name}": numbers, f"{step}.values.{name}": values}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def _read_points(path: Path) -> list[Point]:
    tensors = load_file(path)
    points = [Point(int(draw), {}) for draw in tensors.pop("draws")]
    for key, numbers in tensors.items():
        step, kind, name = key.split(".", 2)
        if kind == "numbers":
            points[int(step)].rows[name] = (numbers, tensors[f"{step}.values.{name}"])
    return points


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

    from edge_dit.models.quantize import round_frozen
    from edge_dit.pictures.patch_sampler import PatchSampler
    from edge_dit.planning.plan import Plan, model_of
    from edge_dit.reference.eager import EagerSession, adapted_subgraph

    manifest = read_manifest(bundle)
    plan = Plan.model_validate(manifest.plan)
    host = PatchSampler(plan.crop_rule)
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
    references: dict[str, tuple[list[Point], dict[str, Any]]] = {}
    with bar("verify", len(rows) + 1) as advance:
        subgraph, _ = adapted_subgraph(plan, model_of(plan))
        adamw = manifest.optimizer
        advance(note="model")
        for target, layout in rows:
            dtype = _weights(manifest, target)
            if dtype not in references:
                round_frozen(subgraph, dtype)
                points = choose_points(EagerSession(subgraph, adamw), bank, adapter, steps)
                found = measure(EagerSession(subgraph, adamw), bank, adapter, points)
                references[dtype] = points, found | patches(sampler, plan.s_max)
            name = titled(manifest, target, layout)
            results[name] = _verify_target(bundle, bank_folder, target, layout, *references[dtype])
            advance(note=name)
    certificate = {
        "schema_version": 1,
        "passed": not changed and all(result["passed"] for result in results.values()),
        "changed_files": [f"{where} ({found})" for where, found in changed.items()],
        "manifest_sha256": sha256(bundle / MANIFEST),
        "reference": f"torch {torch.__version__} eager, float32",
        "steps": steps,
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
    points: list[Point],
    reference: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    facts = {
        "tolerances": TOLERANCES[target],
        "draws": [point.draw for point in points],
        "rows_set": [sum(len(numbers) for numbers, _ in p.rows.values()) for p in points],
    }
    with tempfile.TemporaryDirectory() as folder:
        out, way = Path(folder) / "found.safetensors", Path(folder) / "points.safetensors"
        _write_points(way, points)
        command = [sys.executable, "-m", "edge_dit_runtime.verify"]
        command += [str(bundle), str(bank), target, layout, str(way), str(out)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode != 0 or not out.is_file():
            why = child.stderr.strip().splitlines()[-1:] or ["no message"]
            return {
                "passed": False,
                "error": f"the process ended with code {child.returncode}: {why[0]}",
                **facts,
            }
        found = load_file(out)
    return {**compare(reference, found, TOLERANCES[target]), **facts}


def child(
    bundle: Path, bank_folder: Path, target: str, layout: str, points: Path, out: Path
) -> None:
    """Measure one target and store the tensors; runs in a process of its own."""
    manifest: Manifest = read_manifest(bundle)
    bank = Bank(bank_folder, manifest.plan_hash)
    check_confined(bundle, target)
    session = open_session(bundle, manifest, target, layout)
    found = measure(session, bank, read_adapter(bundle / ADAPTER)[0], _read_points(points))
    del session
    found |= patches(_exported_sampler(bundle, target), manifest.plan["s_max"])
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, out)


if __name__ == "__main__":
    _bundle, _bank, _target, _layout, _points, _out = sys.argv[1:]
    child(Path(_bundle), Path(_bank), _target, _layout, Path(_points), Path(_out))
