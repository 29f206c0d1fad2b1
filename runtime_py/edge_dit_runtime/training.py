"""The training loop over a bank, which can be stopped at any moment.

    train("bundle", "bank", "run")        # Ctrl-C stops it with a checkpoint
    train("bundle", "bank", "run", resume=True)

By `OnStep` an app pauses and stops it, say when the device gets hot.
`edge_dit_runtime.run_folder` says what a run keeps on disk.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, Unpack

from pydantic import BaseModel, Field, TypeAdapter

from edge_dit.contract.adamw import Schedule, learning_rate
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import Bundle, open_bundle
from edge_dit.contract.certificate import why_uncertified
from edge_dit.contract.integrity import check_bundle
from edge_dit.contract.targets import OnnxFacts
from edge_dit.errors import BadInput
from edge_dit.progress import bar, warn
from edge_dit.store.documents import validated
from edge_dit.store.files import StrPath
from edge_dit_runtime.page.watch import Watch
from edge_dit_runtime.run_folder import Run, RunFolder
from edge_dit_runtime.session import check_room, open_session
from edge_dit_runtime.sessions.smoothed import smoothed
from edge_dit_runtime.sessions.state import check_draw
from edge_dit_runtime.sessions.trainer import Draws, Session
from edge_dit_runtime.step_log import Step, StepLog, norm

if TYPE_CHECKING:
    from edge_dit_runtime.loop.previews import PreviewPainter, Previews

SAVE_EVERY = 100
"""Steps between checkpoints."""
MOST_SKIPPED = 10
"""Steps in a row without finite loss and gradients after which training stops."""


@dataclass(frozen=True)
class Wait:
    """An answer of `OnStep`: pause, and ask again later. A checkpoint of all steps done is written
    first. Nothing computes during a pause; memory stays taken.

    Args:
        seconds: until it is asked again.
    """

    seconds: float = 10.0


OnStep = Callable[[int, float], bool | Wait | None]
"""Asked before every step, with (steps done, loss of the last one): None or false goes on, `Wait`
pauses, true stops with a checkpoint. The loss is nan if no step was done or the last was skipped.
Called once more after the last step; that answer does not matter.
"""
LONGEST_SLEEP = 0.2
"""Seconds between two looks for Ctrl-C during a pause."""
Count = Annotated[int, Field(ge=0)]


class _Planned(BaseModel):
    """The part of the manifest's plan that training needs."""

    model_name: str
    rank: Count
    alpha: float
    steps: Count
    seed: Count
    layout: str = ""
    preview_every: Count = 0
    schedule: Schedule = "decay"
    warmup: Count = 0
    accumulate: Annotated[int, Field(ge=1)] = 1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def learning_rate(self, step: int, steps: int, lr: float) -> float:
        """Of a step, see `edge_dit.contract.adamw.learning_rate`."""
        return learning_rate(step, steps, lr, self.schedule, self.warmup)

    def check_steps(self, steps: int) -> None:
        """Raise `BadInput` if the last of ``steps`` draws would not end an update."""
        if steps % self.accumulate:
            raise BadInput(
                "steps",
                found=f"{steps}, where every update takes {self.accumulate} draws",
                expected=f"a multiple of {self.accumulate}: steps are draws",
                remedy=f"take {steps + self.accumulate - steps % self.accumulate}",
            )


@dataclass(frozen=True)
class _Training:
    """What the steps of a run share."""

    session: Session
    bundle: Bundle
    draws: Draws
    folder: RunFolder
    run: Run
    planned: _Planned
    log: StepLog
    watch: Watch
    previews: Previews | None = None

    def show(self) -> None:
        """Paint previews, if any are due, and write the run's page, if it is time to."""
        done = len(self.log)
        if self.previews is not None and self.previews.due(done):
            self.previews.paint(done, self.session.adapter())
            self.watch.show()
        self.watch.look()

    def save(self) -> None:
        """Write a checkpoint."""
        self.watch.keep()
        self.folder.save(self.session, self.run, self.log)


class Options(TypedDict, total=False):
    """Keywords of `train`.

    Attributes:
        target: one of the bundle's targets, "onnx", or with its layout, "onnx:streamed". Default:
            that of the resumed run, else the bundle's first target in the planned layout.
        steps: of the whole run; default the plan's.
        resume: continue from the folder's last checkpoint; default false.
        on_step: asked before every step whether to go on, pause or stop; see `OnStep`.
        any_memory: train even if less memory is free than the layout is predicted to take; default
            false.
        painter: paints the previews of a plan that asks for some, where the bundle lacks the loop's
            parts; default nothing does.
    """

    target: str | None
    steps: int | None
    resume: bool
    on_step: OnStep | None
    any_memory: bool
    painter: PreviewPainter | None


def train(
    bundle: StrPath, bank: StrPath | Draws, folder: StrPath, **options: Unpack[Options]
) -> Run:
    """Train a bundle over its bank.

    Args:
        bundle: an exported bundle.
        bank: the bank precomputed with the same plan; or draws made of pictures just in time, from
            `edge_dit_runtime.live`.
        folder: the run folder: a new one, or with ``resume`` one that was stopped.
        options: target, steps, resume, on_step, any_memory and painter; see `Options`.

    Raises:
        BadInput: bundle, bank or run do not fit together or are damaged; the run exists and
            ``resume`` is off; another process trains into it; it cannot be written; too little
            memory is free; or `MOST_SKIPPED` steps in a row had no finite loss and gradients.

    Example:
        >>> run = er.train("bundle", "bank", "run", steps=3)
        >>> run.done, run.target
        (3, 'onnx')
    """
    for name in options.keys() - Options.__annotations__.keys():
        raise TypeError(f"train() has no keyword {name!r}")
    resume, steps = options.get("resume", False), options.get("steps")
    opened = open_bundle(Path(bundle))
    draws = _opened(bank, opened)
    kept = RunFolder(Path(folder))
    kept.previous(resume)  # before the folder is touched
    planned = validated(
        opened.folder, TypeAdapter(_Planned), opened.manifest.plan, "export it again"
    )
    with kept.occupied():
        previous = kept.previous(resume)
        name, layout = _target_and_layout(opened, options.get("target"), previous, planned.layout)
        check_bundle(opened, name)
        if not options.get("any_memory"):
            check_room(opened, name, layout)
        run = _new_run(opened, draws, planned, name, layout)
        run = replace(run, steps=steps or (previous.steps if previous else run.steps))
        planned.check_steps(run.steps)
        plain = open_session(opened, name, layout)
        session = smoothed(plain, planned.accumulate, planned.ema)
        if reason := why_uncertified(opened, opened.titled(name, layout)):
            warn(f"{bundle}: {reason}; edge-dit verify compares it with PyTorch")
        log = kept.restore(session, run, draws) if previous else StepLog()
        if not log:
            session.load_adapter(opened.adapter())
            kept.begin(run, opened.manifest.plan)
        every = planned.preview_every
        painter = _painter(opened, options.get("painter")) if every else None
        previews = _previews(painter, kept.path, every, run.steps)
        watch = Watch(kept.path, run, log)
        training = _Training(session, opened, draws, kept, run, planned, log, watch, previews)
        try:
            _loop(training, options.get("on_step"))
            training.save()
            if len(log) == run.steps:
                kept.finish(session, run, log)
        finally:
            watch.close()
    if skipped := sorted({log.draws[step] for step in log.skipped}):
        names = ", ".join(map(draws.in_words, skipped[:3]))
        warn(f"steps without finite loss and gradients were skipped: {names}")
    return replace(run, done=len(log))


def _painter(bundle: Bundle, given: PreviewPainter | None) -> PreviewPainter | None:
    """What paints previews: the bundle's loop, else what was given, else nothing, with a word."""
    facts = bundle.facts("onnx") if "onnx" in bundle.manifest.targets else None
    if isinstance(facts, OnnxFacts) and facts.loop:
        from edge_dit_runtime.loop.parts import Parts
        from edge_dit_runtime.loop.previews import LoopPainter

        return LoopPainter(Parts(bundle))
    if given is None:
        warn("no previews: the bundle has no loop's parts; edge-dit run paints them without")
    return given


def _previews(
    painter: PreviewPainter | None, folder: Path, every: int, steps: int
) -> Previews | None:
    """What writes previews; None if there is nothing that paints them."""
    if painter is None:
        return None
    from edge_dit_runtime.loop.previews import Previews

    return Previews(painter, folder, every, steps)


def _opened(bank: StrPath | Draws, bundle: Bundle) -> Draws:
    """The draws of a bank, which must be of the bundle's plan; or those that were given."""
    if not isinstance(bank, (str, os.PathLike)):
        return bank
    opened = Bank(Path(bank), bundle.manifest.plan_hash)
    if all(image.prior for image in opened.index.images):
        raise BadInput(
            bank,
            found="a prior's bank: it teaches no subject",
            expected="a bank of pictures",
            remedy="make one with it: edge-dit collect, with --prior",
        )
    return opened


def _target_and_layout(
    bundle: Bundle, asked: str | None, previous: Run | None, planned: str
) -> tuple[str, str]:
    """Target and layout of a run.

    Args:
        bundle: to train.
        asked: "target" or "target:layout", or None.
        previous: the run that is resumed.
        planned: the layout in the plan; may be empty.

    Raises:
        BadInput: the bundle lacks them.
    """
    name, _, layout = (asked or "").partition(":")
    if not asked and previous:
        return previous.target, bundle.layout(previous.target, previous.layout)
    name = name or next(iter(bundle.manifest.targets), "onnx")
    if not layout:
        if previous and previous.target == name:
            layout = previous.layout
        elif planned in bundle.layouts(name):
            layout = planned
    return name, bundle.layout(name, layout or None)


def _new_run(bundle: Bundle, draws: Draws, plan: _Planned, target: str, layout: str) -> Run:
    """A new run of the plan's steps."""
    return Run(
        bundle=bundle.folder.resolve().name,
        bank=draws.name,
        target=target,
        layout=layout,
        manifest_sha256=bundle.manifest_sha256,
        bank_sha256=draws.identity,
        family=bundle.manifest.family,
        base_model=plan.model_name,
        rank=plan.rank,
        alpha=plan.alpha,
        steps=plan.steps,
    )


def _loop(training: _Training, on_step: OnStep | None) -> None:
    """Train until all steps are done, ``on_step`` stops it, or Ctrl-C. Checkpoints are written
    on the way, not at the end.
    """
    run, log = training.run, training.log
    title = f"train ({run.target})"
    with bar(title, run.steps, len(log)) as advance, interrupt_flag() as interrupted:
        training.show()
        while len(log) < run.steps and _may_go_on(training, on_step, interrupted):
            _step(training)
            training.show()
            advance(note=f"loss {log.recent:.4f}")
            if len(log) == run.steps:
                if on_step:
                    on_step(len(log), log.last)
            elif len(log) % SAVE_EVERY == 0:
                training.save()


def _may_go_on(
    training: _Training, on_step: OnStep | None, interrupted: Callable[[], bool]
) -> bool:
    """Ask ``on_step`` before a step, until it no longer says `Wait`; false stops the run."""
    saved, log = False, training.log
    while not interrupted():
        answer = on_step(len(log), log.last) if on_step else None
        if not isinstance(answer, Wait):
            return not answer and not interrupted()
        if not saved:
            training.save()
            saved = True
        until = time.monotonic() + answer.seconds
        while not interrupted() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_SLEEP))
    return False


def _step(training: _Training) -> None:
    """Do a step and log it, with a loss of nan if it was skipped."""
    session, draws, log = training.session, training.draws, training.log
    started = time.perf_counter()
    number = draws.number(len(log), training.planned.seed)
    lr = training.bundle.manifest.optimizer.lr
    session.lr = training.planned.learning_rate(len(log), training.run.steps, lr)
    draw = draws[number]
    check_draw(draw, training.bundle.manifest, draws.in_words(number))
    loss = session.backward(draw)
    grad_norm = norm(session.gradients()) if isfinite(loss) else float("nan")
    if isfinite(grad_norm):
        session.update()
    else:
        loss = float("nan")
    seconds = round(time.perf_counter() - started, 6)
    log.add(Step(number, draws.draw(number).sigma, loss, session.lr, grad_norm, seconds))
    if log.skipped_in_a_row == MOST_SKIPPED:
        raise BadInput(
            training.folder.path,
            found=f"{MOST_SKIPPED} steps in a row without finite loss and gradients, the last on "
            f"{draws.in_words(number)}",
            expected="numbers; the last checkpoint is kept",
            remedy="plan with a lower lr; if it is always the same draws, precompute again",
        )


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that the step in progress is completed; a second one
    interrupts at once.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return

    def handle(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
