"""A run folder: what training keeps, so that it can be stopped or killed at any moment.

state.safetensors    adapter, optimizer state, losses, steps done, and what they belong to: one
atomic file, which alone decides where a resumed run goes on
run.json             what of that people and other commands want to read
loss.csv             step, draw, sigma, loss; nan where a step was skipped
loss.png             the same as a picture, where matplotlib is installed
adapter.safetensors  the LoRA after the last step
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter

from edge_dit.contract.adapter import (
    DIFFUSERS_FILE,
    PEFT_FILE,
    PEFT_ONLY,
    write_adapter,
    write_adapter_folder,
)
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER
from edge_dit.contract.names import ADAPTED
from edge_dit.errors import BadInput
from edge_dit.store.documents import STRICT, parse_json, read_document, validated, write_document
from edge_dit.store.files import StrPath, cannot_write, write_atomic
from edge_dit.store.locks import locked
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.loss_plot import plot_losses
from edge_dit_runtime.sessions.trainer import Session

RUN = "run.json"
STATE = "state.safetensors"
LOSSES = "loss.csv"
PICTURE = "loss.png"
LOCK = ".lock"
RUN_KEY = "run"
"""In the metadata of `STATE`: what the state belongs to."""
DRAW_KEY, LOSS_KEY = "run.draw", "run.loss"
"""Among the tensors of `STATE`, beside the session's: draw and loss of every step done."""
RECENT = 50
"""Steps over which the loss that is shown is averaged."""
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Run:
    """What a run folder belongs to: run.json, and in the state's metadata.

    Attributes:
        bundle: path of the bundle trained.
        bank: path of its bank.
        target: the target used.
        layout: of the target ("fused").
        manifest_sha256: of the bundle's manifest, so that another bundle is not mistaken for it.
        bank_sha256: `edge_dit.contract.bank.Bank.identity`.
        family: of the base model.
        base_model: the diffusers folder the adapter is for.
        rank, alpha: of the adapter.
        steps: steps asked for.
        done: steps done when last saved.
    """

    __pydantic_config__ = STRICT
    bundle: str
    bank: str
    target: str
    layout: str
    manifest_sha256: str
    bank_sha256: str
    family: str
    base_model: str
    rank: Count
    alpha: float
    steps: Count
    done: Count = 0

    def same_as(self, other: Run) -> bool:
        """Whether one can go on where the other stopped."""
        keys = ("manifest_sha256", "bank_sha256", "target", "layout")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@dataclass
class Losses:
    """Draw and loss of every step done; nan where it was skipped."""

    draws: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0

    def __len__(self) -> int:
        return len(self.draws)

    def add(self, draw: int, loss: float) -> None:
        """One more step."""
        self.draws.append(draw)
        self.losses.append(loss)
        self.skipped_in_a_row = 0 if np.isfinite(loss) else self.skipped_in_a_row + 1

    @property
    def recent(self) -> float:
        """Mean of the last `RECENT` steps that were not skipped."""
        finite = [loss for loss in self.losses[-RECENT:] if np.isfinite(loss)]
        return float(np.mean(finite)) if finite else float("nan")

    @property
    def skipped(self) -> list[int]:
        """The draws that were skipped, each once."""
        pairs = zip(self.draws, self.losses, strict=True)
        return sorted({draw for draw, loss in pairs if not np.isfinite(loss)})


class RunFolder:
    """A run folder on disk.

    Args:
        path: of the folder; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Keep other processes out while the block runs; an empty folder is removed on exit.

        Raises:
            BadInput: another process trains into it, or it cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path / LOCK, self.path))
            except OSError as error:
                raise cannot_write(self.path, error) from error
            try:
                yield
            finally:
                stack.close()
                with suppress(OSError):
                    self.path.rmdir()

    def previous(self, resume: bool) -> Run | None:
        """The run to go on with, or None for a new one.

        Raises:
            BadInput: there is none to resume, or one is there and ``resume`` is off.
        """
        if self._is_empty():
            if resume:
                raise BadInput(
                    self.path, found="no run to resume", remedy="leave out --resume to start one"
                )
            return None
        previous = self.read()
        if not resume:
            raise BadInput(
                self.path,
                found=f"a run is there already ({previous.done} of {previous.steps} steps)",
                remedy="--resume continues it; or choose another -o",
            )
        return previous

    def _is_empty(self) -> bool:
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(p.name[0] == "." for p in self.path.iterdir())

    def read(self) -> Run:
        """run.json.

        Raises:
            BadInput: not a run folder.
        """
        path = self.path / RUN
        remedy = "make one: edge-dit train bundle/ --bank bank/ -o run/"
        raw = read_document(path, "a run folder", remedy)
        return validated(path, TypeAdapter(Run), raw, remedy)

    def begin(self, run: Run) -> None:
        """Write run.json before the first step."""
        write_document(self.path / RUN, asdict(run))

    def restore(self, session: Session, run: Run) -> Losses:
        """Load the checkpoint into ``session``; what was done until then, nothing where no
        checkpoint was written yet.

        Raises:
            BadInput: damaged, or of another bundle, bank, target or layout than ``run``.
        """
        if not (self.path / STATE).exists():
            return Losses()
        try:
            file, saved = self._state()
            state = file.read()
            losses = Losses(state[DRAW_KEY].tolist(), state[LOSS_KEY].tolist())
            if not saved.done == len(losses.draws) == len(losses.losses):
                raise ValueError(f"{saved.done} steps, {len(losses.losses)} losses")
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(
                self.path / STATE, found=f"damaged checkpoint ({error})", remedy="start a new run"
            ) from None
        if not (saved.same_as(run) and self.read().same_as(run)):
            raise BadInput(
                self.path,
                found=f"a run of target {saved.target}, {saved.layout}, of {saved.bundle} and "
                f"{saved.bank}",
                expected="the bundle, bank, target and layout it was started with",
                remedy="pass those, or start a new run with another -o",
            )
        session.load_state_dict(state)
        return losses

    def save(self, session: Session, run: Run, bank: Bank, losses: Losses) -> None:
        """Checkpoint.

        Raises:
            BadInput: the adapter or its moments are not finite, or the folder cannot be written;
                the checkpoint before this one is kept.
        """
        state = session.state_dict()
        if not all_finite(state):
            raise BadInput(
                self.path,
                found=f"training diverged before step {len(losses)}: the adapter is not finite",
                expected="numbers; the last checkpoint is kept",
                remedy="plan with a lower lr",
            )
        state[DRAW_KEY] = np.array(losses.draws, np.int64)
        state[LOSS_KEY] = np.array(losses.losses, np.float64)
        saved = asdict(replace(run, done=len(losses)))
        write_tensors(self.path / STATE, state, {RUN_KEY: json.dumps(saved)})
        write_atomic(self.path / LOSSES, _as_csv(losses, bank))
        write_document(self.path / RUN, saved)

    def finish(self, session: Session, run: Run, bank: Bank, losses: Losses) -> None:
        """Write the trained adapter, and the losses as a picture."""
        write_adapter(self.path / ADAPTER, session.adapter(), run.rank, run.alpha)
        sigmas = [bank.index.draws[draw].sigma for draw in losses.draws]
        plot_losses(self.path / PICTURE, sigmas, losses.losses)

    def adapter(self) -> tuple[dict[str, np.ndarray], Run]:
        """The LoRA tensors as last saved, by diffusers name, and the run.

        Raises:
            BadInput: not a run, or nothing saved in it yet.
        """
        self.read()
        try:
            file, run = self._state()
            tensors = file.read(name for name in file.header.tensors if name.startswith(ADAPTED))
        except (OSError, ValueError) as error:
            raise BadInput(
                self.path / STATE, found=f"no whole checkpoint ({error})", remedy="train first"
            ) from None
        return {name.removeprefix(ADAPTED): value for name, value in tensors.items()}, run

    def _state(self) -> tuple[TensorFile, Run]:
        """The checkpoint, and the run it says it is of.

        Raises:
            OSError: none there.
            ValueError: damaged.
        """
        file = TensorFile(self.path / STATE)
        if RUN_KEY not in file.header.metadata or not file.header.hashed:
            raise ValueError("it does not say what it belongs to")
        raw = parse_json(file.header.metadata[RUN_KEY].encode())
        return file, TypeAdapter(Run).validate_python(raw)  # its ValidationError is a ValueError


def save_lora(run: StrPath, folder: StrPath) -> Path:
    """Write the LoRA of a run as a folder for ``pipe.load_lora_weights``, with a PEFT copy in
    ``peft/``; for a pipeline that has no ``load_lora_weights`` as a PEFT folder.

    Args:
        run: a run folder; it may be unfinished.
        folder: where the LoRA goes; put in place whole, or not at all.

    Returns:
        The safetensors file.

    Raises:
        BadInput: not a run, nothing saved in it yet, or ``folder`` holds something else.

    Example:
        >>> er.save_lora("run", "lora").name
        'pytorch_lora_weights.safetensors'
    """
    tensors, saved = RunFolder(Path(run)).adapter()
    peft_only = saved.family in PEFT_ONLY
    out = Path(folder)
    write_adapter_folder(out, tensors, saved.rank, saved.alpha, saved.base_model, peft_only)
    return out / (PEFT_FILE if peft_only else DIFFUSERS_FILE)


def all_finite(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether no value is infinite or NaN."""
    return all(np.isfinite(value).all() for value in tensors.values())


def _as_csv(losses: Losses, bank: Bank) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "draw", "sigma", "loss"))
    for step, (draw, loss) in enumerate(zip(losses.draws, losses.losses, strict=True)):
        writer.writerow((step, draw, repr(bank.index.draws[draw].sigma), repr(loss)))
    return text.getvalue()
