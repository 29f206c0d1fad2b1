"""Checks, at a number of draws, that every target computes what PyTorch computes.

The host chooses the draws and computes them in PyTorch. Each target and layout computes them in a
process of its own (`edge_dit_runtime.measure`), because a bad program may abort its process. These
are compared: the loss and every gradient of one draw with a LoRA B that is not zero, and of draws
with every input changed; the losses and the adapter of a training trajectory from the initial
adapter; single updates from made-up states (`edge_dit_runtime.probes`); patches of random images.

At some draws rounding decides PyTorch's own gradients, and a comparison would say nothing. If
possible a few rows of LoRA B are moved before the step (`edge_dit.reference.kinks`). Otherwise the
draw is left out, and counted.

What manifest and adapter say is compared with the plan (`edge_dit.app.claims`), and some draws of
the bank with the same draws recomputed (`edge_dit.reference.evidence`). docs/verify.md says what
the tolerances are and why.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from edge_dit.app.claims import false_claims, loop_claims
from edge_dit.app.rounding import NUDGE, drift, groups, rounded, unrounded
from edge_dit.app.verify_words import varied_inputs
from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.bank import Bank, draw_order
from edge_dit.contract.bundle import Bundle, open_bundle
from edge_dit.contract.certificate import (
    UNROUNDED,
    Certificate,
    Draws,
    Drift,
    TargetResult,
    differences,
    write_certificate,
)
from edge_dit.contract.integrity import content_faults
from edge_dit.contract.names import THROUGH
from edge_dit.contract.signature import SIGNATURE
from edge_dit.contract.targets import TARGETS, WIDE, OnnxFacts
from edge_dit.errors import CheckFailed, require
from edge_dit.pictures.dataset import Captioned, read_folder
from edge_dit.planning.plan import Plan, model_of
from edge_dit.progress import bar, warn
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.loop.measured import LOOP, loop_probe, named_draws
from edge_dit_runtime.measure import (
    MARK,
    Change,
    Point,
    Task,
    measure,
    measure_gradients,
    patches,
    replayed,
    write_points,
)
from edge_dit_runtime.probes import PROBES
from edge_dit_runtime.sessions.trainer import Session

if TYPE_CHECKING:
    from edge_dit.models.model import Model
    from edge_dit.models.subgraph import TrainableSubgraph
    from edge_dit.reference.eager import EagerSession
    from edge_dit.reference.locate import Modules, Suspect

MOST_LEFT_OUT = 0.5
"""Largest share of the draws that may be left out. With more, a certificate would speak for the
minority of draws that are easy to compare."""
ANY_CAPTION = "-"
"""For pictures without one: prompts are read from the bank, captions are not."""


@dataclass(frozen=True)
class Reference:
    """PyTorch's results, with frozen matrices rounded as one dtype stores them.

    Attributes:
        points: where they were computed.
        draws: their numbers.
        tensors: the results.
        gradients: computes loss and gradients again.
        draw: that these are of.
        session: that computes them.
    """

    points: list[Point]
    draws: Draws
    tensors: Mapping[str, np.ndarray]
    gradients: Callable[[], Mapping[str, np.ndarray]]
    draw: Mapping[str, np.ndarray]
    session: EagerSession

    @cached_property
    def modules(self) -> Modules:
        """Modules of the sub-graph's blocks."""
        from edge_dit.reference.locate import called_modules

        return called_modules(self.session.subgraph, self.gradients)

    def suspect(self, measured: Mapping[str, np.ndarray], tolerance: float) -> Suspect:
        """Where the fault is most likely that makes a target measure this."""
        from edge_dit.reference.locate import suspect

        right, graph = self.gradients(), self.session.subgraph  # with the adapter they are of
        return suspect(graph, self.modules, self.draw, right, measured, tolerance)


def verify(
    bundle: Path,
    bank: Path,
    steps: int = 20,
    targets: Sequence[str] | None = None,
    model: Path | None = None,
    planned: Plan | None = None,
    images: Path | Sequence[Captioned] | None = None,
) -> Certificate:
    """Compare every target of a bundle with PyTorch and write the certificate into it.

    Every file is hashed; a bundle whose files differ from its manifest does not pass.

    Args:
        bundle: an exported bundle; parity.json is written into it, unless it is signed.
        bank: its bank.
        steps: length of the training trajectory.
        targets: some of the bundle's targets; default all.
        model: its model's folder; default where it was last planned for on this machine.
        planned: the plan that the bundle should be of; default the one in its manifest.
        images: the pictures that the bank was made of, or their folder; stored draws are then
            compared with those pictures too.

    Raises:
        BadInput: bundle and bank do not fit, the model is gone, none of the bank's pictures is in
            ``images``, or torch is missing.
        CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
    """
    require("torch", "the PyTorch reference of verify")
    import torch

    from edge_dit.reference.eager import adapted_subgraph
    from edge_dit.reference.evidence import examine

    opened = open_bundle(bundle)
    draws = Bank(bank, opened.manifest.plan_hash)
    names = list(targets or opened.manifest.targets)
    # Targets with frozen weights in fewer bytes come last, because PyTorch's are rounded for them.
    names.sort(key=lambda name: opened.dtype(name) != WIDE)
    faults = [f for name in names for f in content_faults(opened, name, verify_hashes=True)]
    changed = {fault.where: fault.found for fault in faults}
    results: dict[str, TargetResult] = {}
    total = sum(
        len(opened.layouts(name)) * (1 + _unrounded_too(opened, name)) + _has_loop(opened, name)
        for name in names
    )
    drifts: dict[str, Drift] = {}
    with bar("verify", total + 2) as advance:
        plan = Plan.model_validate({**opened.manifest.plan, "model": model})
        stock = model_of(plan)
        if isinstance(images, Path):
            images = read_folder(images, ANY_CAPTION, plan.s_max, recursive=True)
        # First, so that text encoders and trained blocks are not in memory together.
        evidence = examine(plan, stock, draws, images or ())
        advance(note="bank")
        subgraph, batch = adapted_subgraph(plan, stock)
        claims = false_claims(opened, plan, subgraph, batch, planned)
        advance(note="model")
        stage = _Stage(opened, draws, plan, stock, subgraph, steps, drifts)
        for title, result, more in stage.results(names):
            results[title] = result
            claims += more
            advance(note=title)
    certificate = Certificate(
        manifest_sha256=opened.manifest_sha256,
        reference=f"torch {torch.__version__} eager, float32",
        steps=steps,
        targets=results,
        bank=evidence,
        changed_files=[f"{where} ({found})" for where, found in changed.items()],
        false_claims=claims,
        varied=varied_inputs(opened, plan, steps),
        exercised=[f"{probe.name}: {probe.shows}" for probe in PROBES],
        drift=drifts,
    )
    _store(opened, certificate)
    return certificate


def _store(bundle: Bundle, certificate: Certificate) -> None:
    """Write the certificate, unless that would end the bundle's signature."""
    if (bundle.folder / SIGNATURE).is_file():
        warn(
            f"{bundle.folder} is signed: the certificate in it stays, unless you remove {SIGNATURE}"
        )
    else:
        write_certificate(bundle, certificate)


def _unrounded_too(bundle: Bundle, target: str) -> bool:
    """Whether a target rounds to int8 in graphs that can be rewritten not to."""
    return bundle.compute(target) != WIDE and isinstance(bundle.facts(target), OnnxFacts)


def _has_loop(bundle: Bundle, target: str) -> bool:
    return getattr(bundle.facts(target), LOOP, None) is not None


@dataclass
class _Stage:
    """What the comparisons of a bundle's targets share.

    Attributes:
        bundle: opened.
        bank: of the bundle.
        plan, model: of the bundle.
        subgraph: with its fresh LoRA; it changes.
        steps: length of the trajectory.
        drifts: what int8 costs, by target; filled.
    """

    bundle: Bundle
    bank: Bank
    plan: Plan
    model: Model
    subgraph: TrainableSubgraph
    steps: int
    drifts: dict[str, Drift]

    def results(self, names: Sequence[str]) -> Iterator[tuple[str, TargetResult, list[str]]]:
        """Title, result and false claims of every layout of every target, and of the loop's parts.

        Args:
            names: of the targets, those with frozen weights in fewer bytes last.
        """
        from edge_dit.models.quantize import round_subgraph
        from edge_dit.reference.eager import lora_tensors

        bundle, plan = self.bundle, self.plan
        fresh = lora_tensors(self.subgraph)
        references: dict[str, Reference] = {}
        for target in names:
            dtype = bundle.stored(target)
            if dtype not in references:
                round_subgraph(self.subgraph, dtype)
                references[dtype] = measure_reference(
                    self.subgraph, fresh, plan, self.bank, self.steps
                )
            compare = self._in_float if bundle.compute(target) == WIDE else self._in_int8
            for title, result in compare(target, references[dtype], fresh):
                yield title, result, []
        for target in filter(partial(_has_loop, bundle), names):
            wanted, claims = loop_reference(bundle, target, plan, self.model, self.subgraph)
            found = verify_loop(bundle, self.bank.folder, target, wanted)
            yield f"{target} ({LOOP})", found, claims

    def _in_float(
        self, target: str, reference: Reference, _: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, TargetResult]]:
        bundle = self.bundle
        for layout in bundle.layouts(target):
            result = verify_target(bundle, self.bank.folder, target, layout, reference)
            yield bundle.titled(target, layout), result

    def _in_int8(
        self, target: str, reference: Reference, fresh: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, TargetResult]]:
        from edge_dit.reference.eager import EagerSession, adapted_subgraph

        bundle, bank, plan = self.bundle, self.bank, self.plan
        can = _unrounded_too(bundle, target)
        with unrounded(bundle, target) if can else nullcontext(bundle) as plain:
            for layout in bundle.layouts(target) if can else ():
                title = f"{bundle.titled(target, layout)} {UNROUNDED}"
                yield title, verify_target(plain, bank.folder, target, layout, reference)
        points, steps = reference.points, self.steps
        rows = target == "executorch"
        right, limits = rounded(self.subgraph, plan, bank, fresh, points, steps, rows)
        patch = {n: value for n, value in reference.tensors.items() if n.startswith("patch.")}
        for layout in bundle.layouts(target):
            found = measure_target(bundle, bank.folder, target, layout, points, steps)
            draws = reference.draws
            if isinstance(found, str):
                result = TargetResult(draws, error=found)
            else:
                apart = groups(right, found, limits)
                apart += differences(patch, found, TARGETS[target].tolerances)
                result = TargetResult(draws, apart)
            yield bundle.titled(target, layout), result
        exact, _ = adapted_subgraph(plan, self.model)
        session = EagerSession(exact, plan.optimizer)
        in_float = measure(session, bank, fresh, steps, replayed(points))
        self.drifts[target] = drift(in_float, right)


# ---------------------------------------------------------------- PyTorch


def measure_reference(
    subgraph: TrainableSubgraph,
    adapter: Mapping[str, np.ndarray],
    plan: Plan,
    bank: Bank,
    steps: int,
) -> Reference:
    """Choose where to compare, and compute PyTorch's results there.

    Args:
        subgraph: with LoRA in place and frozen matrices rounded to what the target stores.
        adapter: the fresh LoRA of the plan.
        plan: of the bundle.
        bank: its bank.
        steps: length of the trajectory.

    Raises:
        CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
    """
    import torch

    from edge_dit.models.patch_sampler import PatchSampler
    from edge_dit.reference.eager import EagerSession

    session = EagerSession(subgraph, plan.optimizer)
    search = Search(session, bank, steps)
    tensors = measure(session, bank, adapter, steps, search.next)
    host = PatchSampler(plan.crop_rule)

    def sampler(*arrays: np.ndarray) -> np.ndarray:
        return host(*map(torch.from_numpy, arrays)).numpy()

    def gradients() -> Mapping[str, np.ndarray]:
        return measure_gradients(session, bank, adapter, dict, replayed(search.points))

    tensors |= patches(sampler, plan.shared())
    first = bank[search.points[0].draw]
    return Reference(search.points, search.draws(), tensors, gradients, first, session)


# ---------------------------------------------------------------- where to compare


@dataclass
class Search:
    """Finds the points of `edge_dit_runtime.measure.measure` at which PyTorch's gradients do not
    jump, and keeps them.

    Draws are taken in the order of a shuffled bank: first those that are compared as they are
    stored, then those that are changed.

    Attributes:
        session: PyTorch's.
        bank: of the bundle.
        steps: length of the trajectory.
        points: found so far.
        left_out: numbers of the stored draws that were left out.
    """

    session: EagerSession
    bank: Bank
    steps: int
    points: list[Point] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def next(self, change: Change) -> Point:
        """The next point, for the adapter that the session has now.

        Raises:
            CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
        """
        from edge_dit.reference.kinks import nudge_from_kinks

        passed_over: list[int] = []
        limit = len(self.bank)
        if len(self.points) <= self.steps:
            passed_over = self.left_out
            limit = int(MOST_LEFT_OUT / (1 - MOST_LEFT_OUT) * (self.steps + 1))
        while True:
            taken = len(self.points) + len(passed_over)
            number = draw_order(taken, len(self.bank), 0)
            draw = change(self.bank[number])
            rows = nudge_from_kinks(self.session.subgraph, draw)
            if rows is not None or is_well_posed(self.session, draw):
                self.points.append(Point(number, rows or {}))
                return self.points[-1]
            passed_over.append(number)
            if len(passed_over) > limit:
                raise _too_sensitive(self.session, taken + 1, len(passed_over))

    def draws(self) -> Draws:
        """The numbers of the draws that are compared as they are stored, for a certificate."""
        stored = self.points[: self.steps + 1]
        moved = [sum(len(numbers) for numbers, _ in point.rows.values()) for point in stored]
        return Draws([point.draw for point in stored], self.left_out, moved)


def _too_sensitive(session: EagerSession, tried: int, left_out: int) -> CheckFailed:
    modules = " and ".join(session.subgraph.family.before_relu)
    through = session.subgraph.tail == THROUGH and session.subgraph.after
    remedy = f"; LoRA on {modules} would let verify move away from such places" if modules else ""
    if modules and through:
        remedy += ", but in the tail no block has any: plan with another tail"
    return CheckFailed(
        f"{left_out} of {tried} draws cannot be compared: rounding decides PyTorch's "
        f"own gradients there. At most {MOST_LEFT_OUT:.0%} may be left out{remedy}"
    )


def is_well_posed(session: Session, draw: Mapping[str, np.ndarray]) -> bool:
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
    draws = reference.draws
    steps = len(draws.compared) - 1
    measured = measure_target(bundle, bank, target, layout, reference.points, steps)
    if isinstance(measured, str):
        return TargetResult(draws, error=measured)
    return compared(reference, measured, target)


def measure_target(
    bundle: Bundle, bank: Path, target: str, layout: str, points: list[Point], steps: int
) -> dict[str, np.ndarray] | str:
    """What one target computes in a child process; or why that ended early."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "points.safetensors"
        write_points(chosen, points)
        return _in_a_child(
            Task(str(bundle.folder), str(bank), target, layout, str(chosen), steps, "")
        )


def _in_a_child(task: Task) -> dict[str, np.ndarray] | str:
    """What a process of its own measures; or why it ended early."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.safetensors"
        command = [sys.executable, "-m", "edge_dit_runtime.measure"]
        asked = replace(task, out=str(out)).as_json()
        child = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
        if child.returncode != 0 or not out.is_file():
            return why_ended(child.returncode, child.stderr)
        return TensorFile(out).read()


def verify_loop(
    bundle: Bundle, bank: Path, target: str, wanted: Mapping[str, np.ndarray]
) -> TargetResult:
    """Measure the loop's parts in a child process and compare them with PyTorch's results."""
    none = Draws([], [], [])
    measured = _in_a_child(Task(str(bundle.folder), str(bank), target, LOOP, "", 0, ""))
    if isinstance(measured, str):
        return TargetResult(none, error=measured)
    return TargetResult(none, differences(wanted, measured, TARGETS[target].tolerances))


def loop_reference(
    bundle: Bundle, target: str, plan: Plan, model: Model, trained: TrainableSubgraph
) -> tuple[dict[str, np.ndarray], list[str]]:
    """PyTorch's results for the loop's parts, and what the manifest says wrongly of them.

    Args:
        bundle: opened.
        target: that has the parts.
        plan: of the bundle.
        model: of the plan.
        trained: its trained blocks, rounded as the target holds them; their LoRA changes.
    """
    from edge_dit.models.quantize import round_autoencoder
    from edge_dit.planning.prompts import LoopPrompts
    from edge_dit.reference.eager import EagerSession
    from edge_dit.reference.loop import WholeModel
    from edge_dit_export.targets.loop import tables_of
    from edge_dit_export.targets.loop_source import loop_source

    facts = cast(OnnxFacts, bundle.facts(target)).loop
    assert facts is not None
    texts = [text for n, text in enumerate(facts.prompts) if n not in facts.negatives]
    negative = facts.prompts[facts.negatives[0]] if facts.negatives else None
    source = loop_source(plan, model, LoopPrompts(texts, facts.previews, facts.caption, negative))
    wanted = {f"prompts.{name}": value for name, value in tables_of(source).items()}
    adapter = with_random_b(bundle.adapter())
    EagerSession(trained, plan.optimizer).load_adapter(adapter)
    round_autoencoder(source.vae, plan.held)
    checkpoint = model.checkpoint(plan.held)
    whole = WholeModel(plan, model, checkpoint, source.skeleton, source.vae, trained)
    probe = loop_probe(bundle, facts, model.objective)
    encoded = {number: source.encoded[number] for number in probe.prompts}
    first = encoded[probe.prompts[0]]
    wanted |= named_draws(whole.collected(probe.image, first, probe.draws))
    for (step, prompt), value in whole.predictions(probe.latents, encoded, probe.timesteps).items():
        wanted[f"paint.{step}.{prompt}"] = value
    if facts.painting:
        wanted["paint.pixels"] = whole.decoded(probe.latents)
    return wanted, loop_claims(facts, source)


def compared(reference: Reference, measured: Mapping[str, np.ndarray], target: str) -> TargetResult:
    """What a target computed beside what PyTorch did, and where it is most likely wrong.

    Args:
        reference: PyTorch's; its sub-graph must still be as it was then.
        measured: by the same names.
        target: whose tolerances count.
    """
    tolerances = TARGETS[target].tolerances
    rows = differences(reference.tensors, measured, tolerances)
    result = TargetResult(reference.draws, rows)
    if not any(row.kind == "gradients" for row in result.failed):
        return result
    found = reference.suspect(measured, tolerances["gradients"])
    return replace(result, likely=found.likely, beside=list(found.beside))


def why_ended(code: int, written: str) -> str:
    """Why a child process ended early, for people.

    Args:
        code: its exit code; negative for a signal.
        written: its standard error. A message of ours stands whole at its end, after `MARK`; of
            anything else the last line says most.
    """
    _, mark, message = written.rpartition(MARK)
    if not mark:
        message = (written.strip().splitlines() or ["no message"])[-1]
    return f"the process ended with code {code}: {message.strip()}"
