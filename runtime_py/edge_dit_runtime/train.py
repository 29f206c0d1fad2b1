"""The training loop: a session over a bank, stoppable and killable at any moment.

run/state.safetensors  adapter, optimiser state, losses, steps done, and what they belong to: one
                       atomic file, the truth
run/run.json           what of that people and other commands want to read
run/loss.csv           step, draw, sigma, loss; nan where a step was skipped
run/loss.png           the same as a picture, where matplotlib is installed
run/adapter.safetensors  the LoRA after the last step
"""

from __future__ import annotations

import csv
import io
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.adapter import read_adapter, write_adapter
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER, MANIFEST, Manifest, check_has_target, read_manifest
from edge_dit.contract.certificate import why_uncertified
from edge_dit.contract.integrity import check_bundle
from edge_dit.errors import BadInput, is_installed
from edge_dit.progress import bar, warn
from edge_dit.store.documents import STRICT, parse_json, read_document, validated, write_document
from edge_dit.store.files import cannot_write, sha256, write_atomic
from edge_dit.store.locks import locked
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.session import layouts, open_session, titled
from edge_dit_runtime.sessions.state import check_draw
from edge_dit_runtime.sessions.trainer import Session

RUN = "run.json"
STATE = "state.safetensors"
LOSSES = "loss.csv"
LOCK = ".lock"
SAVE_EVERY = 100
"""Steps between checkpoints."""
MOST_SKIPPED = 10
"""Steps in a row without finite loss and gradients after which training stops."""
DRAWS, LOSS = "run.draw", "run.loss"
"""In the state, beside the session's: draw and loss of every step done."""
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Run:
    """What a run folder belongs to: run.json, and in the state's metadata.

    Attributes:
        bundle: path of the bundle trained.
        bank: path of its bank.
        target: the target used.
        manifest_sha256: of the bundle's manifest, so that another bundle is not mistaken for it.
        base_model: the diffusers folder the adapter is for.
        rank, alpha: of the adapter.
        steps: steps asked for.
        done: steps done when last saved.
        family: of the base model; runs written before it was kept are of SANA.
        layout: of the target, "fused" or "streamed".
        bank_sha256: `edge_dit.contract.bank.Bank.identity`; runs written before it was kept have
            none.
    """

    __pydantic_config__ = STRICT
    bundle: str
    bank: str
    target: str
    manifest_sha256: str
    base_model: str
    rank: Count
    alpha: float
    steps: Count
    done: Count = 0
    family: str = "sana"
    layout: str = "fused"
    bank_sha256: str = ""

    def same_as(self, other: Run) -> bool:
        """Whether one can go on where the other stopped."""
        keys = ("manifest_sha256", "bank_sha256", "target", "layout")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


class _Planned(BaseModel):
    """What training needs of the plan in a manifest."""

    model: str
    rank: Count
    alpha: float
    steps: Count
    seed: Count
    layout: str = ""


@dataclass
class _Losses:
    """Draw and loss of every step done; nan where it was skipped."""

    draws: list[int]
    losses: list[float]
    skipped_in_a_row: int = 0

    def add(self, draw: int, loss: float) -> None:
        self.draws.append(draw)
        self.losses.append(loss)
        self.skipped_in_a_row = 0 if np.isfinite(loss) else self.skipped_in_a_row + 1

    @property
    def recent(self) -> float:
        """Mean of the last 50 that were not skipped."""
        finite = [loss for loss in self.losses[-50:] if np.isfinite(loss)]
        return float(np.mean(finite)) if finite else float("nan")

    @property
    def skipped(self) -> list[int]:
        """The draws that were skipped, each once."""
        pairs = zip(self.draws, self.losses, strict=True)
        return sorted({draw for draw, loss in pairs if not np.isfinite(loss)})


def draw_order(step: int, draws: int, seed: int) -> int:
    """Which draw a step trains on: every epoch is a permutation of the bank of its own."""
    epoch, position = divmod(step, draws)
    return int(np.random.default_rng([seed, epoch]).permutation(draws)[position])


def train(
    bundle: Path,
    bank_folder: Path,
    folder: Path,
    target: str | None = None,
    steps: int | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
    layout: str | None = None,
    verify_hashes: bool = False,
) -> Run:
    """Train a bundle over its bank.

    Args:
        bundle: an exported bundle.
        bank_folder: the bank precomputed with the same plan.
        folder: the run; new, or with ``resume`` one that was stopped.
        target: which of the bundle's targets; default the first.
        steps: total steps; default the plan's.
        resume: go on from the folder's last checkpoint.
        stop_after: stop, with a checkpoint, after this many steps of this call.
        on_step: called with (steps done, loss) after every step.
        layout: of the target; default the run's that is resumed, else the plan's, else the target's
            first.
        verify_hashes: hash every file of the bundle, see
            `edge_dit.contract.integrity.check_bundle`.

    Raises:
        BadInput: bundle, bank or run do not fit together or are damaged; the run exists and
            ``resume`` is off; another process trains into it; it cannot be written; or
            `MOST_SKIPPED` steps in a row had no finite loss and gradients.
    """
    manifest = read_manifest(bundle)
    bank = Bank(bank_folder, manifest.plan_hash)
    _previous(folder, resume)  # before the folder is touched
    target = target or next(iter(manifest.targets), "onnx")
    check_has_target(bundle, manifest, target)
    check_bundle(bundle, manifest, target, verify_hashes)
    with _occupied(folder):
        previous = _previous(folder, resume)
        planned = validated(bundle, TypeAdapter(_Planned), manifest.plan, "export it again")
        known = layouts(manifest, target)
        wanted = planned.layout if planned.layout in known else known[0]
        layout = layout or (previous.layout if previous else wanted)
        run = _run(bundle, manifest.family, planned, bank, target, layout)
        run = replace(run, steps=steps or (previous.steps if previous else run.steps))
        session = open_session(bundle, manifest, target, layout)
        if reason := why_uncertified(bundle, titled(manifest, target, layout)):
            warn(f"{bundle}: {reason}; edge-dit verify compares it with PyTorch")
        losses = _Losses([], [])
        if previous and (folder / STATE).exists():
            losses = _restore(folder, session, previous, run)
        else:
            session.load_adapter(read_adapter(bundle / ADAPTER)[0])
            write_document(folder / RUN, asdict(run))
        last = run.steps if stop_after is None else min(run.steps, len(losses.draws) + stop_after)
        _loop(session, manifest, bank, folder, run, losses, last, planned.seed, on_step)
        done = len(losses.draws)
        _save(folder, session, run, bank, losses)
        if done == run.steps:
            write_adapter(folder / ADAPTER, session.adapter(), run.rank, run.alpha)
            _plot(folder, bank, losses)
    if losses.skipped:
        names = ", ".join(map(bank.in_words, losses.skipped[:3]))
        warn(f"steps without finite loss and gradients were skipped: {names}")
    return replace(run, done=done)


def _run(bundle: Path, family: str, plan: _Planned, bank: Bank, target: str, layout: str) -> Run:
    """A new run, of as many steps as planned."""
    return Run(
        bundle=str(bundle.resolve()),
        bank=str(bank.folder.resolve()),
        target=target,
        manifest_sha256=sha256(bundle / MANIFEST),
        base_model=plan.model,
        rank=plan.rank,
        alpha=plan.alpha,
        steps=plan.steps,
        family=family,
        layout=layout,
        bank_sha256=bank.identity,
    )


def _loop(
    session: Session,
    manifest: Manifest,
    bank: Bank,
    folder: Path,
    run: Run,
    losses: _Losses,
    last: int,
    seed: int,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Train until ``last`` steps are done, or Ctrl-C; with checkpoints, but none at the end."""
    done = len(losses.draws)
    with bar(f"train ({run.target})", run.steps, done) as advance, interrupt_flag() as interrupted:
        while done < last and not interrupted():
            number = draw_order(done, len(bank), seed)
            session.lr = learning_rate(done, run.steps, manifest.optimizer.lr)
            draw = bank[number]
            check_draw(draw, manifest, bank.in_words(number))
            loss = session.backward(draw)
            if np.isfinite(loss) and _all_finite(session.gradients()):
                session.update()
            else:
                loss = float("nan")
            losses.add(number, loss)
            if losses.skipped_in_a_row == MOST_SKIPPED:
                raise BadInput(
                    folder,
                    found=f"{MOST_SKIPPED} steps in a row without finite loss and gradients, the "
                    f"last on {bank.in_words(number)}",
                    expected="numbers; the last checkpoint is kept",
                    remedy="plan with a lower lr; if it is always the same draws, precompute again",
                )
            done += 1
            advance(note=f"loss {losses.recent:.4f}")
            if on_step:
                on_step(done, loss)
            if done % SAVE_EVERY == 0 and done < last:
                _save(folder, session, run, bank, losses)


def _all_finite(tensors: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(value).all() for value in tensors.values())


@contextmanager
def _occupied(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run; a folder in which nothing was saved goes again."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, folder))
        except OSError as error:
            raise cannot_write(folder, error) from error
        try:
            yield
        finally:
            stack.close()
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that the step under way ends whole; a second one
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


def _previous(folder: Path, resume: bool) -> Run | None:
    """The run in ``folder``, or None for a new one."""
    if not folder.exists() or (folder.is_dir() and all(p.name[0] == "." for p in folder.iterdir())):
        if resume:
            raise BadInput(
                folder, found="no run to resume", remedy="leave out --resume to start one"
            )
        return None
    previous = read_run(folder)
    if not resume:
        raise BadInput(
            folder,
            found=f"a run is there already ({previous.done} of {previous.steps} steps)",
            remedy="--resume continues it; or choose another -o",
        )
    return previous


def read_run(folder: Path) -> Run:
    """run.json of a run folder.

    Raises:
        BadInput: not a run folder.
    """
    path, remedy = folder / RUN, "make one: edge-dit train bundle/ --bank bank/ -o run/"
    raw = read_document(path, "a run folder", remedy)
    return validated(path, TypeAdapter(Run), raw, remedy)


def _save(folder: Path, session: Session, run: Run, bank: Bank, losses: _Losses) -> None:
    """Checkpoint. The state alone decides where a resumed run goes on; the rest are copies.

    Raises:
        BadInput: the adapter or its moments are not finite, or the folder cannot be written; the
            checkpoint before this one is kept.
    """
    state = session.state_dict()
    if not _all_finite(state):
        raise BadInput(
            folder,
            found=f"training diverged before step {len(losses.draws)}: the adapter is not finite",
            expected="numbers; the last checkpoint is kept",
            remedy="plan with a lower lr",
        )
    state[DRAWS] = np.array(losses.draws, np.int64)
    state[LOSS] = np.array(losses.losses, np.float64)
    saved = asdict(replace(run, done=len(losses.draws)))
    write_tensors(folder / STATE, state, {"run": json.dumps(saved)})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "draw", "sigma", "loss"))
    for step, (draw, loss) in enumerate(zip(losses.draws, losses.losses, strict=True)):
        writer.writerow((step, draw, repr(bank.index.draws[draw].sigma), repr(loss)))
    write_atomic(folder / LOSSES, text.getvalue())
    write_document(folder / RUN, saved)


def _read_state(folder: Path) -> tuple[TensorFile, Run]:
    """The checkpoint, and the run it says it is of.

    Raises:
        OSError: none there.
        ValueError: damaged, or written before it said so.
    """
    file = TensorFile(folder / STATE)
    if "run" not in file.header.metadata or not file.header.hashed:
        raise ValueError("written by an older edge-dit")
    raw = parse_json(file.header.metadata["run"].encode())
    return file, TypeAdapter(Run).validate_python(raw)  # its ValidationError is a ValueError


def _restore(folder: Path, session: Session, previous: Run, run: Run) -> _Losses:
    """Load the checkpoint into ``session``; what was done until then."""
    try:
        file, saved = _read_state(folder)
        state = file.read()
        losses = _Losses(state[DRAWS].tolist(), state[LOSS].tolist())
        if not saved.done == len(losses.draws) == len(losses.losses):
            raise ValueError(f"{saved.done} steps, {len(losses.draws)} losses")
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            folder / STATE, found=f"damaged checkpoint ({error})", remedy="start a new run"
        ) from None
    if not (saved.same_as(run) and previous.same_as(run)):
        raise BadInput(
            folder,
            found=f"a run of target {saved.target}, {saved.layout}, of {saved.bundle} and "
            f"{saved.bank}",
            expected="the bundle, bank, target and layout it was started with",
            remedy="pass those, or start a new run with another -o",
        )
    session.load_state_dict(state)
    return losses


def trained_adapter(folder: Path) -> tuple[dict[str, np.ndarray], Run]:
    """The LoRA tensors of a run as last saved, and the run.

    Raises:
        BadInput: not a run, or nothing saved in it yet.
    """
    read_run(folder)
    try:
        file, run = _read_state(folder)
        tensors = file.read(name for name in file.header.tensors if name.startswith("adapter."))
    except (OSError, ValueError) as error:
        raise BadInput(
            folder / STATE, found=f"no whole checkpoint ({error})", remedy="train first"
        ) from None
    return {name.removeprefix("adapter."): value for name, value in tensors.items()}, run


def _plot(folder: Path, bank: Bank, run_losses: _Losses) -> None:
    """loss.png: each step's loss, its running mean, and the mean by noise level."""
    rows = [
        (step, bank.index.draws[draw].sigma, loss)
        for step, (draw, loss) in enumerate(zip(run_losses.draws, run_losses.losses, strict=True))
        if np.isfinite(loss)
    ]
    if not rows or not is_installed("matplotlib"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps, sigmas, losses = map(np.asarray, zip(*rows, strict=True))
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(steps, losses, ".", markersize=2, alpha=0.3, color="tab:blue")
    left.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="flow-matching loss", title="Loss", yscale="log")
    left.legend()
    edges = np.linspace(0, 1, 9)
    half = len(losses) // 2
    for part, label in ((slice(0, half), "first half"), (slice(half, None), "second half")):
        which = np.clip(np.digitize(sigmas[part], edges) - 1, 0, 7)
        bins = [b for b in range(8) if (which == b).any()]
        means = [losses[part][which == b].mean() for b in bins]
        right.plot([(edges[b] + edges[b + 1]) / 2 for b in bins], means, "o-", label=label)
    right.set(xlabel="sigma", ylabel="mean loss", title="Loss by noise level")
    right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(folder / "loss.png", buffer.getvalue())
