"""The training loop: a session over a bank, stoppable at any step.

run/run.json           bundle, bank, target, steps asked for
run/state.safetensors  adapter, optimiser state and cursor, one atomic file: the truth
run/loss.csv           step, draw, sigma, loss
run/loss.png           the same as a picture, where matplotlib is installed
run/adapter.safetensors  the LoRA after the last step
"""

from __future__ import annotations

import csv
import io
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edge_dit.adamw import learning_rate
from edge_dit.adapter import read_adapter, write_adapter
from edge_dit.bank import Bank
from edge_dit.bundle import ADAPTER, MANIFEST, check_has_target, read_manifest
from edge_dit.errors import BadInput, is_installed
from edge_dit.files import sha256, write_atomic, write_json, write_tensors
from edge_dit.progress import bar
from edge_dit_runtime.session import Session, layouts, open_session

RUN = "run.json"
STATE = "state.safetensors"
LOSSES = "loss.csv"
SAVE_EVERY = 100
"""Steps between checkpoints."""


@dataclass(frozen=True)
class Run:
    """run.json: what a run folder belongs to.

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
    """

    bundle: str
    bank: str
    target: str
    manifest_sha256: str
    base_model: str
    rank: int
    alpha: float
    steps: int
    done: int = 0
    family: str = "sana"
    layout: str = "fused"


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
        layout: of the target; default the run's that is resumed, else the target's first.

    Raises:
        BadInput: bundle, bank or run do not fit together, or the run exists and ``resume`` is off.
    """
    manifest = read_manifest(bundle)
    bank = Bank(bank_folder, manifest.plan_hash)
    target = target or next(iter(manifest.targets))
    previous = _previous(folder, resume)
    total = steps or (previous.steps if previous else int(manifest.plan["steps"]))
    check_has_target(bundle, manifest, target)
    layout = layout or (previous.layout if previous else layouts(manifest, target)[0])
    run = Run(
        bundle=str(bundle.resolve()),
        bank=str(bank_folder.resolve()),
        target=target,
        manifest_sha256=sha256(bundle / MANIFEST),
        base_model=str(manifest.plan["model"]),
        rank=int(manifest.plan["rank"]),
        alpha=float(manifest.plan["alpha"]),
        steps=total,
        family=manifest.family,
        layout=layout,
    )
    session = open_session(bundle, manifest, target, layout)
    done, rows = 0, []
    if previous:
        done, rows = _restore(folder, session, previous, run)
    else:
        session.load_adapter(read_adapter(bundle / ADAPTER)[0])
    seed, lr = int(manifest.plan["seed"]), manifest.optimizer.lr

    last = total if stop_after is None else min(total, done + stop_after)
    with bar(f"train ({target})", total, done) as advance, interrupt_flag() as interrupted:
        while done < last and not interrupted():
            number = draw_order(done, len(bank), seed)
            session.lr = learning_rate(done, total, lr)
            loss = session.step(bank[number])
            rows.append((done, number, bank.index.draws[number].sigma, loss))
            done += 1
            advance(note=f"loss {_recent(rows):.4f}")
            if on_step:
                on_step(done, loss)
            if done % SAVE_EVERY == 0 and done < last:
                _save(folder, session, run, done, rows)
    _save(folder, session, run, done, rows)
    if done == total:
        write_adapter(folder / ADAPTER, session.adapter(), run.rank, run.alpha)
        _plot(folder, rows)
    return replace(run, done=done)


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


def _recent(rows: list[tuple[int, int, float, float]]) -> float:
    return float(np.mean([row[3] for row in rows[-50:]]))


def _previous(folder: Path, resume: bool) -> Run | None:
    """The run in ``folder``, or None for a new one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
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
    try:
        return Run(**json.loads((folder / RUN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BadInput(
            folder,
            found=f"no {RUN} in it",
            expected="a run folder",
            remedy="make one: edge-dit train bundle/ --bank bank/ -o run/",
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(folder / RUN, found=f"not a run ({error})") from None


def _save(folder: Path, session: Session, run: Run, done: int, rows: list[Any]) -> None:
    """Checkpoint. The state file alone decides where a resumed run goes on: losses after it are
    dropped when it is read.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "draw", "sigma", "loss"))
    writer.writerows((step, draw, repr(sigma), repr(loss)) for step, draw, sigma, loss in rows)
    write_json(folder / RUN, {**asdict(run), "done": done})
    write_atomic(folder / LOSSES, text.getvalue())
    metadata = {"done": str(done), "manifest_sha256": run.manifest_sha256, "target": run.target}
    write_tensors(folder / STATE, session.state_dict(), metadata)


def _restore(folder: Path, session: Session, previous: Run, run: Run) -> tuple[int, list[Any]]:
    """Load the checkpoint into ``session``; steps done and their losses."""
    started = (previous.manifest_sha256, previous.target, previous.layout)
    if started != (run.manifest_sha256, run.target, run.layout):
        raise BadInput(
            folder,
            found=f"a run of target {previous.target}, {previous.layout}, of {previous.bundle}",
            expected="the bundle, target and layout it was started with",
            remedy="pass those, or start a new run with another -o",
        )
    path = folder / STATE
    try:
        with safe_open(path, framework="numpy") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            done = int((file.metadata() or {})["done"])
        with (folder / LOSSES).open(encoding="utf-8") as file:
            rows = [
                (int(r["step"]), int(r["draw"]), float(r["sigma"]), float(r["loss"]))
                for r in csv.DictReader(file)
            ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            path, found=f"damaged checkpoint ({error})", remedy="start a new run"
        ) from None
    session.load_state_dict(state)
    return done, rows[:done]


def trained_adapter(folder: Path) -> tuple[dict[str, np.ndarray], Run]:
    """The LoRA tensors of a run as last saved, and the run.

    Raises:
        BadInput: not a run, or nothing saved in it yet.
    """
    run = read_run(folder)
    try:
        with safe_open(folder / STATE, framework="numpy") as file:
            done = int((file.metadata() or {})["done"])
            tensors = {
                name.removeprefix("adapter."): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith("adapter.")
            }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput(
            folder / STATE, found=f"no whole checkpoint ({error})", remedy="train first"
        ) from None
    return tensors, replace(run, done=done)


def _plot(folder: Path, rows: list[Any]) -> None:
    """loss.png: each step's loss, its running mean, and the mean by noise level."""
    if not is_installed("matplotlib"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps, _, sigmas, losses = map(np.asarray, zip(*rows, strict=True))
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
