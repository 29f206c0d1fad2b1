"""Subjects to personalise to, and the model tuned to each of them in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_dit.cluster.pool import Pool
from edge_dit.errors import BadInput
from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import add_lora, lora_modules, lora_name, remove_lora
from edge_dit.pictures.dataset import Captioned, read_folder
from edge_dit.planning.plan import Plan, model_of
from edge_dit.progress import warn
from edge_dit.reference.evaluate import Whole, encode_whole
from edge_dit.reference.full_lora import train_full_lora
from edge_dit.store.documents import digest, read_document, write_document
from edge_dit.store.tensors import TensorFile, write_tensors

TRAIN = "train"
"""Folder of a subject with the images to tune on."""
HELD_OUT = "heldout"
"""Folder next to the images to tune on, with those that only measure."""

Measure = Callable[["TunedSubjects", "Subject", str], np.ndarray]
"""Measures one subject while the model is tuned to it, under a progress bar of the given title.
Returns float64 [rows, columns]; every row must be finite. On a cluster it must be a function of a
module, or a `functools.partial` of one.
"""
SHARES = 4
"""Tasks that a measurement is cut into for every place of a cluster."""


@dataclass(frozen=True)
class Subject:
    """Something to personalise to.

    Attributes:
        name: shown in progress bars and written to the selection.
        images: to tune on; their shorter side is ``plan.s_max`` pixels.
        heldout: images of the same size that tuning does not see; may be empty.
    """

    name: str
    images: list[Captioned]
    heldout: list[Captioned] = field(default_factory=list)

    @property
    def measured(self) -> list[Captioned]:
        """The images that losses and captions are taken from: held-out ones if there are any."""
        return self.heldout or self.images


def read_subject(
    name: str, images: Path, prompt: str | None, side: int, recursive: bool = False
) -> Subject:
    """Read a subject from its folder of images, and held-out images from `HELD_OUT` next to it.

    Args:
        name: of the subject.
        images: folder of the images to tune on.
        prompt: caption of every image without one of its own.
        side: length of an image's shorter side after reading, pixels.
        recursive: whether sub-folders of images are read.

    Raises:
        BadInput: no images, images that cannot be read, or images without a caption.
    """
    heldout = images.parent / HELD_OUT
    return Subject(
        name,
        read_folder(images, prompt, side, recursive, warn),
        read_folder(heldout, prompt, side, recursive, warn) if heldout.is_dir() else [],
    )


def read_subjects(
    folder: Path, prompt: str | None, side: int, recursive: bool = False
) -> list[Subject]:
    """Read one subject from every folder within ``folder``, in the order of their names.

    A subject's folder holds images, or the folders ``train`` and ``heldout``:

        DIR/cat/1.png                                   tuned on and measured
        DIR/dog/train/1.png, DIR/dog/heldout/2.png      tuned on the first, measured on the second

    Args:
        folder: of the subjects.
        prompt: caption of every image without one of its own.
        side: length of an image's shorter side after reading, pixels.
        recursive: whether sub-folders of images are read.

    Raises:
        BadInput: there is no such folder, or a subject cannot be read.
    """
    if not folder.is_dir():
        raise BadInput(folder, found="no such folder", expected="a folder of subjects")
    subjects = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path / TRAIN).is_dir():
            subjects.append(read_subject(path.name, path / TRAIN, prompt, side, recursive))
        else:
            subjects.append(Subject(path.name, read_folder(path, prompt, side, recursive, warn)))
    return subjects


class TunedSubjects:
    """Tunes the whole model to one subject after another and measures each tuned model.

        tuned = TunedSubjects(plan, [Subject("toy", images)], work, steps=300)
        numbers, seconds = tuned.measure("mean-loss", {"levels": 8}, 1, [mean_loss])

    Every LoRA and every subject's numbers are kept in the folder ``work`` as soon as they are
    finished. A selection that was stopped reads them and continues with what is missing. The names
    of the files hold a digest of everything that decides their content.

    Args:
        plan: of the model; which blocks it skips does not matter.
        subjects: at least one.
        work: folder for what is finished; it is created.
        steps: of tuning, for each subject.
        pool: a cluster that tunes and measures. Its machines see the model and the pictures at the
            same paths; what they find comes back, and is written here.

    Attributes:
        model: of the plan.
        pipeline: of the model. It carries a subject's LoRA only while that subject is measured.

    Raises:
        BadInput: no subject, or the model changed since the plan was made.
    """

    def __init__(
        self,
        plan: Plan,
        subjects: Sequence[Subject],
        work: Path,
        steps: int,
        pool: Pool | None = None,
    ) -> None:
        if not subjects:
            raise BadInput("subjects", found="none", expected="at least one folder of images")
        self.model = model_of(plan)
        self.plan, self.subjects, self.work, self.steps = plan, subjects, work, steps
        self._pool = pool
        self.pipeline = load_pipeline(self.model.folder, variant=self.model.variant)

    def encode(self, images: list[Captioned]) -> list[Whole]:
        """Encode images and captions with the model, for tuning or for losses."""
        return encode_whole(self.plan, self.model, self.pipeline, images)

    def shares(self, columns: int) -> list[range]:
        """The columns of a measurement, cut where a cluster measures parts of it side by side."""
        if self._pool is None:
            return [range(columns)]
        tasks = max(1, SHARES * self._pool.places // len(self.subjects))
        size = -(-columns // tasks)
        return [range(n, min(n + size, columns)) for n in range(0, columns, size)]

    def measure(
        self, name: str, settings: dict[str, Any], columns: int, parts: Sequence[Measure]
    ) -> tuple[list[np.ndarray], float]:
        """Measure every subject, or read what was measured of it before.

        Args:
            name: of the measurement; files of its numbers begin with it.
            settings: JSON of all that decides the numbers besides the subject and its tuning.
            columns: numbers in a row.
            parts: called without gradients, for subjects that were not measured before; the columns
                of each follow those of the one before.

        Returns:
            float64 [rows, columns] for each subject, and the seconds that tuning and measuring all
            of them took, earlier runs included.
        """
        paths = []
        for subject in self.subjects:
            seen = [(image.sha256, image.caption) for image in subject.measured]
            about = digest([self._tuning(subject), settings, seen])
            paths.append(self.work / f"{name}-{about}.json")
        kept = [_read_numbers(path, columns) for path in paths]
        missing = [number for number, found in enumerate(kept) if found is None]
        for number, found in zip(missing, self._measured(missing, name, parts), strict=True):
            write_document(paths[number], {"numbers": found[0].tolist(), "seconds": found[1]})
            kept[number] = found
        results = [found for found in kept if found is not None]
        return [numbers for numbers, _ in results], sum(seconds for _, seconds in results)

    def _measured(
        self, numbers: list[int], name: str, parts: Sequence[Measure]
    ) -> Iterator[tuple[np.ndarray, float]]:
        """The numbers of subjects, and the seconds that tuning and measuring each took."""
        tasks = [_Task(number, name, part) for number in numbers for part in parts]
        done = map(partial(_measure_part, self), self._with_adapters(tasks))
        if self._pool is not None:
            opener = partial(TunedSubjects, self.plan, self.subjects, self.work, self.steps)
            self._tune(opener, numbers)
            done = self._pool.map(opener, _measure_part, self._with_adapters(tasks))
        for _ in numbers:
            found = [next(done) for _ in parts]
            yield np.hstack([columns for columns, _ in found]), sum(time for _, time in found)

    def _tune(self, opener: Callable[[], TunedSubjects], numbers: list[int]) -> None:
        """Have a cluster tune the subjects that no LoRA is kept of."""
        assert self._pool is not None
        subjects = [self.subjects[number] for number in numbers]
        lacking = [n for n, s in zip(numbers, subjects, strict=True) if self._kept(s) is None]
        for number, adapter in zip(
            lacking, self._pool.map(opener, _tune_one, lacking), strict=True
        ):
            write_tensors(self._adapter_path(self.subjects[number]), adapter)

    def _with_adapters(self, tasks: list[_Task]) -> Iterator[_Task]:
        """The tasks, each with the LoRA of its subject, read or trained at its turn."""
        for task in tasks:
            started = time.monotonic()
            adapter = self._adapter(self.subjects[task.subject])
            yield replace(task, adapter=adapter, seconds=time.monotonic() - started)

    def _adapter(self, subject: Subject) -> dict[str, np.ndarray]:
        """The LoRA tuned to a subject, by diffusers names: read if it is kept, else trained."""
        adapter = self._kept(subject)
        if adapter is None:
            adapter = self.trained(subject)
            write_tensors(self._adapter_path(subject), adapter)
        return adapter

    def _kept(self, subject: Subject) -> dict[str, np.ndarray] | None:
        path = self._adapter_path(subject)
        if path.is_file():
            try:
                return TensorFile(path).read()
            except ValueError:  # damaged: train it again
                path.unlink()
        return None

    def trained(self, subject: Subject) -> dict[str, np.ndarray]:
        """Train the LoRA of a subject; by diffusers names."""
        images = self.encode(subject.images)
        return train_full_lora(self.plan, self.model, self.pipeline, images, self.steps)

    def _adapter_path(self, subject: Subject) -> Path:
        return self.work / f"tuned-{digest(self._tuning(subject))}.safetensors"

    def _tuning(self, subject: Subject) -> dict[str, Any]:
        """All that decides a subject's LoRA, as JSON."""
        names = {"model_hash", "s_max", "rank", "alpha", "lora_targets", "optimizer", "seed"}
        images = [(image.sha256, image.caption) for image in subject.images]
        plan = self.plan.model_dump(mode="json", include=names)
        return {**plan, "steps": self.steps, "images": images}


@dataclass(frozen=True)
class _Task:
    """A part of a measurement of one subject.

    Attributes:
        subject: its number.
        name: of the measurement.
        part: what measures.
        adapter: the LoRA tuned to the subject, by diffusers names.
        seconds: that tuning took before.
    """

    subject: int
    name: str
    part: Measure
    adapter: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0


def _tune_one(tuned: TunedSubjects, number: int) -> dict[str, np.ndarray]:
    return tuned.trained(tuned.subjects[number])


def _measure_part(tuned: TunedSubjects, task: _Task) -> tuple[np.ndarray, float]:
    """Some columns of one subject's numbers, and the seconds that tuning and measuring took."""
    started, subject = time.monotonic(), tuned.subjects[task.subject]
    title = f"{subject.name} ({task.subject + 1} of {len(tuned.subjects)}), {task.name}"
    transformer = tuned.pipeline.transformer
    with _lora_in_place(tuned.plan, tuned.model, transformer, task.adapter), torch.no_grad():
        numbers = task.part(tuned, subject, title)
    return numbers, task.seconds + time.monotonic() - started


def _read_numbers(path: Path, columns: int) -> tuple[np.ndarray, float] | None:
    """Numbers and seconds of a finished measurement; None if the file is missing or damaged."""
    try:
        raw = read_document(path, "a measurement", "")
        numbers, seconds = np.array(raw["numbers"], dtype=float), float(raw["seconds"])
    except (BadInput, ValueError, TypeError, KeyError):
        return None
    whole = numbers.ndim == 2 and numbers.shape[1] == columns
    return (numbers, seconds) if whole and np.isfinite([*numbers.flat, seconds]).all() else None


@contextmanager
def _lora_in_place(
    plan: Plan, model: Model, transformer: nn.Module, adapter: dict[str, np.ndarray]
) -> Iterator[None]:
    """Put a LoRA made by `train_full_lora` into the transformer while a block runs."""
    modules = lora_modules(model.family, transformer, range(plan.layers), plan.lora_targets)
    add_lora(transformer, modules, plan.rank, plan.alpha, plan.seed)
    try:
        for name, parameter in transformer.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.from_numpy(adapter[lora_name(name)]))
        yield
    finally:
        remove_lora(transformer)
