"""A run folder: what training keeps, so that it can be stopped or killed at any moment.

    state.safetensors    adapter, optimizer state, losses and the `Run` they belong to
    run.json             that `Run`, for people and other commands
    loss.csv             step, draw, sigma, loss; nan where a step was skipped
    steps.csv            step, learning rate, gradient norm, seconds
    settings.json        the plan of its bundle, for `edge-dit compare`
    run.html             a page that shows how far it is (`edge_dit_runtime.page`)
    loss.png             the losses as a picture, if matplotlib is installed
    adapter.safetensors  the LoRA after the last step

state.safetensors is written atomically. It alone decides where a resumed run continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from edge_dit.contract.adapter import write_adapter, write_adapter_folder
from edge_dit.contract.adapter_formats import format_of
from edge_dit.contract.bundle import ADAPTER
from edge_dit.contract.names import ADAPTED, AVERAGE
from edge_dit.errors import BadInput
from edge_dit.store.documents import STRICT, parse_json, read_document, validated, write_document
from edge_dit.store.files import StrPath, cannot_write
from edge_dit.store.locks import locked
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.loss_plot import plot_losses
from edge_dit_runtime.sessions.trainer import Draws, Session
from edge_dit_runtime.step_log import StepLog, restored

RUN = "run.json"
STATE = "state.safetensors"
SETTINGS = "settings.json"
PICTURE = "loss.png"
LOCK = ".lock"
RUN_KEY = "run"
"""Key in the metadata of `STATE`: the `Run` as JSON."""
DRAW_KEY, LOSS_KEY = "run.draw", "run.loss"
"""Tensors in `STATE` besides the session's: draw (int64) and loss (float64) of every step done."""
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Run:
    """What a run trains, and how far it is; in run.json and in the metadata of its state.

    Attributes:
        bundle: name of the folder of the bundle trained.
        bank: name of the folder of its bank, or of the pictures it made its draws of.
        target: the target it trains.
        layout: the target's layout ("fused").
        manifest_sha256: of the bundle's manifest, which tells the bundle from any other.
        bank_sha256: `Draws.identity`.
        family: the base model's family.
        base_model: name or hub id of the model the adapter is for.
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
        """Whether this run may continue ``other``."""
        keys = ("manifest_sha256", "bank_sha256", "target", "layout")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


class RunFolder:
    """A run folder on disk.

    Args:
        path: the folder; it may not exist yet.
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
        """The run to continue, or None for a new one.

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
        """The content of run.json.

        Raises:
            BadInput: not a run folder.
        """
        path = self.path / RUN
        remedy = "make one: edge-dit train bundle/ --bank bank/ -o run/"
        raw = read_document(path, "a run folder", remedy)
        return validated(path, TypeAdapter(Run), raw, remedy)

    def begin(self, run: Run, plan: Mapping[str, Any]) -> None:
        """Write run.json and settings.json before the first step.

        Args:
            run: what is trained.
            plan: of the bundle's manifest.
        """
        write_document(self.path / RUN, asdict(run))
        write_document(self.path / SETTINGS, dict(plan))

    def restore(self, session: Session, run: Run, draws: Draws) -> StepLog:
        """Load the checkpoint into ``session``; the steps until then, or none without one.

        Raises:
            BadInput: it is damaged, or belongs to another bundle, bank, target or layout.
        """
        if not (self.path / STATE).exists():
            return StepLog()
        try:
            file, saved = self._state()
            state = file.read()
            numbers, losses = state[DRAW_KEY].tolist(), state[LOSS_KEY].tolist()
            if not saved.done == len(numbers) == len(losses):
                raise ValueError(f"{saved.done} steps, {len(losses)} losses")
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
        sigmas = [draws.draw(number).sigma for number in numbers]
        return restored(self.path, numbers, sigmas, losses)

    def save(self, session: Session, run: Run, log: StepLog) -> None:
        """Write a checkpoint, loss.csv and run.json.

        Raises:
            BadInput: the adapter or its moments are not finite, or the folder cannot be written;
                the last checkpoint is kept.
        """
        state = session.state_dict()
        if not all_finite(state):
            raise BadInput(
                self.path,
                found=f"training diverged before step {len(log)}: the adapter is not finite",
                expected="numbers; the last checkpoint is kept",
                remedy="plan with a lower lr",
            )
        state[DRAW_KEY] = np.array(log.draws, np.int64)
        state[LOSS_KEY] = np.array(log.losses, np.float64)
        saved = asdict(replace(run, done=len(log)))
        write_tensors(self.path / STATE, state, {RUN_KEY: json.dumps(saved)})
        log.write_losses(self.path)
        write_document(self.path / RUN, saved)

    def finish(self, session: Session, run: Run, log: StepLog) -> None:
        """Write the trained adapter, and the losses as a picture."""
        write_adapter(self.path / ADAPTER, session.adapter(), run.rank, run.alpha)
        plot_losses(self.path / PICTURE, log)

    def adapter(self) -> tuple[dict[str, np.ndarray], Run]:
        """The LoRA tensors as last saved, or their average if the run keeps one, by diffusers name;
        and the run.

        Raises:
            BadInput: not a run, or nothing saved in it yet.
        """
        self.read()
        try:
            file, run = self._state()
            names = file.header.tensors
            kind = AVERAGE if any(name.startswith(AVERAGE) for name in names) else ADAPTED
            tensors = file.read(name for name in names if name.startswith(kind))
        except (OSError, ValueError) as error:
            raise BadInput(
                self.path / STATE, found=f"no whole checkpoint ({error})", remedy="train first"
            ) from None
        return {name.removeprefix(kind): value for name, value in tensors.items()}, run

    def _state(self) -> tuple[TensorFile, Run]:
        """The checkpoint file, and the run in its metadata.

        Raises:
            OSError: there is none.
            ValueError: it is damaged.
        """
        file = TensorFile(self.path / STATE)
        if RUN_KEY not in file.header.metadata or not file.header.hashed:
            raise ValueError("it does not say what it belongs to")
        raw = parse_json(file.header.metadata[RUN_KEY].encode())
        return file, TypeAdapter(Run).validate_python(raw)  # its ValidationError is a ValueError


def save_lora(run: StrPath, folder: StrPath, format: str | None = None) -> Path:
    """Write the LoRA of a run as a folder to take away. Its B holds alpha / rank, so that the
    strength is the same in every reader.

    Args:
        run: a run folder; it may be unfinished.
        folder: the folder to write; written whole, or not at all.
        format: "diffusers", "peft", "comfyui" or "kohya"; not every family has each. Default: what
            the stock pipeline loads, a folder for ``pipe.load_lora_weights`` with a PEFT copy in
            ``peft/``, or a plain PEFT folder for a pipeline without ``load_lora_weights``.

    Returns:
        The safetensors file.

    Raises:
        BadInput: not a run, nothing saved in it yet, ``folder`` holds something else, or the run's
            family has no such format.

    Example:
        >>> er.save_lora("run", "lora").name
        'pytorch_lora_weights.safetensors'
    """
    tensors, saved = RunFolder(Path(run)).adapter()
    form, out = format_of(saved.family, format), Path(folder)
    write_adapter_folder(out, tensors, saved.rank, saved.alpha, saved.base_model, form)
    return out / form.file


def all_finite(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether no value is infinite or NaN."""
    return all(np.isfinite(value).all() for value in tensors.values())
