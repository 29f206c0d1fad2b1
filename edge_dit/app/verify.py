"""Checks, at a number of draws, that every target computes what PyTorch computes.

The host chooses the draws and computes them in PyTorch. Each target and layout computes them in a
process of its own (`edge_dit_runtime.measure`), because a bad program may abort its process. These
are compared: the loss and every gradient of one draw with a LoRA B that is not zero; the losses and
the adapter of a training trajectory from the initial adapter; a few patches of a random image.
docs/verify.md says what the tolerances are and why.

At some draws rounding decides PyTorch's own gradients, and a comparison would say nothing. If
possible the host moves a few rows of LoRA B before the step, the same for both sides
(`edge_dit.reference.kinks`). Otherwise it leaves the draw out, and the certificate counts it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import Bundle, open_bundle
from edge_dit.contract.certificate import (
    Certificate,
    Difference,
    Draws,
    TargetResult,
    write_certificate,
)
from edge_dit.contract.integrity import content_faults
from edge_dit.contract.targets import TARGETS, WIDE
from edge_dit.errors import CheckFailed, require
from edge_dit.planning.plan import Plan, model_of
from edge_dit.progress import bar
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.measure import Point, Task, measure, patches, write_points
from edge_dit_runtime.training import draw_order

if TYPE_CHECKING:
    from edge_dit.models.subgraph import TrainableSubgraph
    from edge_dit.reference.eager import EagerSession

NUDGE = 2e-6
"""Relative size of the nudge of `is_well_posed`: just above what float32 rounding does."""
MOST_LEFT_OUT = 0.5
"""Largest share of the draws that may be left out. With more, a certificate would speak for the
minority of draws that are easy to compare."""
KINDS = ("loss", "gradients", "trajectory", "adapter", "patch")
"""What is compared, in the order of the table."""


@dataclass(frozen=True)
class Points:
    """Where a target is compared: 1 + steps points, and which draws were left out on the way."""

    points: list[Point]
    left_out: list[int]

    def draws(self) -> Draws:
        """The numbers of these draws, for a certificate."""
        moved = [sum(len(numbers) for numbers, _ in p.rows.values()) for p in self.points]
        return Draws([point.draw for point in self.points], self.left_out, moved)


@dataclass(frozen=True)
class Reference:
    """PyTorch's results, with frozen matrices rounded as one dtype stores them."""

    points: Points
    tensors: Mapping[str, np.ndarray]


def verify(
    bundle: Path,
    bank: Path,
    steps: int = 20,
    targets: Sequence[str] | None = None,
    model: Path | None = None,
) -> Certificate:
    """Compare every target of a bundle with PyTorch and write the certificate into it.

    Every file is hashed; a bundle whose files differ from its manifest does not pass.

    Args:
        bundle: an exported bundle; parity.json is written into it.
        bank: its bank.
        steps: length of the training trajectory.
        targets: some of the bundle's targets; default all.
        model: its model's folder; default where it was last planned for on this machine.

    Raises:
        BadInput: bundle and bank do not fit, the model is gone, or torch is missing.
        CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
    """
    require("torch", "the PyTorch reference of verify")
    import torch

    from edge_dit.models.quantize import round_frozen
    from edge_dit.reference.eager import adapted_subgraph

    opened = open_bundle(bundle)
    draws = Bank(bank, opened.manifest.plan_hash)
    names = list(targets or opened.manifest.targets)
    # Targets with frozen weights in fewer bytes come last, because PyTorch's are rounded for them.
    names.sort(key=lambda name: opened.dtype(name) != WIDE)
    faults = [f for name in names for f in content_faults(opened, name, verify_hashes=True)]
    changed = {fault.where: fault.found for fault in faults}
    pairs = [(target, layout) for target in names for layout in opened.layouts(target)]
    references: dict[str, Reference] = {}
    results: dict[str, TargetResult] = {}
    with bar("verify", len(pairs) + 1) as advance:
        plan = Plan.model_validate({**opened.manifest.plan, "model": model})
        subgraph, _ = adapted_subgraph(plan, model_of(plan))
        advance(note="model")
        for target, layout in pairs:
            dtype = opened.dtype(target)
            if dtype not in references:
                round_frozen(subgraph, dtype)
                references[dtype] = measure_reference(subgraph, opened, draws, steps)
            title = opened.titled(target, layout)
            results[title] = verify_target(opened, bank, target, layout, references[dtype])
            advance(note=title)
    certificate = Certificate(
        manifest_sha256=opened.manifest_sha256,
        reference=f"torch {torch.__version__} eager, float32",
        steps=steps,
        targets=results,
        changed_files=[f"{where} ({found})" for where, found in changed.items()],
    )
    write_certificate(opened, certificate)
    return certificate


# ---------------------------------------------------------------- PyTorch


def measure_reference(
    subgraph: TrainableSubgraph, bundle: Bundle, bank: Bank, steps: int
) -> Reference:
    """Choose where to compare, and compute PyTorch's results there.

    Args:
        subgraph: with LoRA in place and frozen matrices rounded to what the target stores.
        bundle: opened.
        bank: its bank.
        steps: length of the trajectory.

    Raises:
        CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
    """
    import torch

    from edge_dit.pictures.patch_sampler import PatchSampler
    from edge_dit.reference.eager import EagerSession

    adapter, adamw = bundle.adapter(), bundle.manifest.optimizer
    chosen = choose_points(EagerSession(subgraph, adamw), bank, adapter, steps)
    tensors = measure(EagerSession(subgraph, adamw), bank, adapter, chosen.points)
    plan = Plan.model_validate(bundle.manifest.plan)
    host = PatchSampler(plan.crop_rule)

    def sampler(*arrays: np.ndarray) -> np.ndarray:
        return host(*map(torch.from_numpy, arrays)).numpy()

    return Reference(chosen, tensors | patches(sampler, plan.s_max))


def choose_points(
    session: EagerSession, bank: Bank, adapter: Mapping[str, np.ndarray], steps: int
) -> Points:
    """1 + ``steps`` points along PyTorch's own trajectory at which gradients do not jump.

    Args:
        session: PyTorch's; its adapter and optimizer state change.
        bank: of the bundle.
        adapter: the initial adapter.
        steps: length of the trajectory.

    Raises:
        CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
    """
    from edge_dit.reference.kinks import nudge_from_kinks

    points: list[Point] = []
    left_out: list[int] = []
    most = int((steps + 1) * MOST_LEFT_OUT / (1 - MOST_LEFT_OUT))
    session.load_adapter(with_random_b(adapter))
    while len(points) <= steps:
        number = draw_order(len(points) + len(left_out), len(bank), 0)
        rows = nudge_from_kinks(session.subgraph, bank[number])
        if rows is None and not is_well_posed(session, bank[number]):
            left_out.append(number)
            if len(left_out) > most:
                raise _too_sensitive(session, len(points), len(left_out))
            continue
        points.append(Point(number, rows or {}))
        if len(points) == 1:
            session.load_adapter(adapter)
        else:
            session.step(bank[number])
    return Points(points, left_out)


def _too_sensitive(session: EagerSession, compared: int, left_out: int) -> CheckFailed:
    modules = " and ".join(session.subgraph.family.before_relu)
    return CheckFailed(
        f"{left_out} of {compared + left_out} draws cannot be compared: rounding decides PyTorch's "
        f"own gradients there. At most {MOST_LEFT_OUT:.0%} may be left out"
        + (f"; LoRA on {modules} would let verify move away from such places" if modules else "")
    )


def is_well_posed(session: EagerSession, draw: Mapping[str, np.ndarray]) -> bool:
    """Whether a nudge of the entry state by `NUDGE` leaves the gradients within tolerance.

    If it does not, rounding decides them, and AdamW turns the difference into whole steps: such a
    draw says nothing about an export.
    """
    session.backward(draw)
    reference = session.gradients()
    nudge = NUDGE * np.random.default_rng(0).choice([-1.0, 1.0], draw["entry"].shape)
    for sign in (1, -1):
        entry = (draw["entry"] * (1 + sign * nudge)).astype(np.float32)
        session.backward({**draw, "entry": entry})
        for name, value in session.gradients().items():
            limit = TARGETS["onnx"].tolerances["gradients"] * np.abs(reference[name]).max()
            if np.abs(value - reference[name]).max() > limit:
                return False
    return True


# ---------------------------------------------------------------- a target


def verify_target(
    bundle: Bundle, bank: Path, target: str, layout: str, reference: Reference
) -> TargetResult:
    """Measure one target in a child process and compare it with ``reference``."""
    draws = reference.points.draws()
    with tempfile.TemporaryDirectory() as folder:
        out, chosen = Path(folder) / "measured.safetensors", Path(folder) / "points.safetensors"
        write_points(chosen, reference.points.points)
        task = Task(str(bundle.folder), str(bank), target, layout, str(chosen), str(out))
        command = [sys.executable, "-m", "edge_dit_runtime.measure"]
        child = subprocess.run(
            command, input=task.as_json(), capture_output=True, text=True, check=False
        )
        if child.returncode != 0 or not out.is_file():
            why = child.stderr.strip().splitlines()[-1:] or ["no message"]
            error = f"the process ended with code {child.returncode}: {why[0]}"
            return TargetResult(draws, error=error)
        measured = TensorFile(out).read()
    return TargetResult(draws, differences(reference.tensors, measured, TARGETS[target].tolerances))


def differences(
    reference: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
    tolerances: Mapping[str, float],
) -> list[Difference]:
    """How far each tensor of ``reference`` is from the one measured.

    Args:
        reference: PyTorch's tensors, by the names of `edge_dit_runtime.measure.measure`.
        measured: the target's tensors.
        tolerances: by kind, the largest `Difference.relative` that passes.
    """
    return [_difference(n, want, measured.get(n), tolerances) for n, want in reference.items()]


def _difference(
    name: str, want: np.ndarray, have: np.ndarray | None, tolerances: Mapping[str, float]
) -> Difference:
    kind = name.partition(".")[0]
    if have is None or have.shape != want.shape:
        return Difference(name, kind, np.inf, np.inf, 0.0, np.inf, tolerances[kind])
    want, have = want.astype(np.float64).ravel(), have.astype(np.float64).ravel()
    error = np.abs(want - have)
    if kind == "trajectory":
        relative = float((error / np.abs(want)).max())  # each step's loss against its own size
    else:
        scale = np.abs(want).max()
        relative = float(error.max() / scale) if scale > 0 else float(error.max())
    norms = np.linalg.norm(want) * np.linalg.norm(have)
    return Difference(
        name=name,
        kind=kind,
        max=float(error.max()),
        mean=float(error.mean()),
        cosine=float(want @ have / norms) if norms > 0 else 1.0,
        relative=relative if np.isfinite(have).all() else np.inf,
        tolerance=tolerances[kind],
    )


# ---------------------------------------------------------------- for people


def table(certificate: Certificate) -> Table:
    """The worst relative difference of each kind and target, and how many draws were left out."""
    limits: dict[str, list[str]] = {}
    for title in certificate.targets:
        tolerances = TARGETS[title.partition(" ")[0]].tolerances
        words = ", ".join(f"{kind} {tolerances[kind]:.0e}" for kind in KINDS)
        limits.setdefault(words, []).append(title)
    caption = "\n".join(f"limits of {', '.join(names)}: {words}" for words, names in limits.items())
    shown = Table(
        title=f"compared with {certificate.reference}, {certificate.steps} steps",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,  # fits a terminal of 80 columns
    )
    shown.add_column("target", min_width=12)
    for heading in (*KINDS, "draws", "left out", "verdict"):
        shown.add_column(heading, no_wrap=heading != "left out")
    for title, result in certificate.targets.items():
        worst = result.worst
        cells = [f"{worst[kind].relative:.1e}" if kind in worst else "-" for kind in KINDS]
        counts = str(len(result.draws.compared)), str(len(result.draws.left_out))
        shown.add_row(title, *cells, *counts, "passed" if result.passed else "FAILED")
    return shown


def why_failed(certificate: Certificate) -> str:
    """Lines for people: changed files, and the worst tensor of each target that failed."""
    lines = ["parity failed"]
    lines += [f"  not what was exported: {name}" for name in certificate.changed_files]
    for title, result in certificate.targets.items():
        if result.error:
            lines.append(f"  {title}: {result.error}")
        elif failed := result.failed:
            lines.append(f"  {title}: {failed[0].in_words()} ({len(failed)} tensors failed)")
    return "\n".join(lines)
