"""Event files for TensorBoard, where its package is installed:  tensorboard --logdir run/

Only its record writer and messages are used: no TensorFlow, and no thread.
"""

from __future__ import annotations

import io
import time
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

from edge_dit.errors import is_installed
from edge_dit_runtime.step_log import BINS, Step, StepLog

NAME = "events.out.tfevents."


class Events:
    """Writes the steps of a run that trains; of a resumed one into a further file, which begins
    with the mark that makes TensorBoard forget steps that are repeated.

    Args:
        folder: of the run.
        begun: number of the first step to write; 0 where there is no such file yet.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, begun: int) -> None:
        # Messages without type stubs.
        events: Any = import_module("tensorboard.compat.proto.event_pb2")
        summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
        self._writer: Any = import_module("tensorboard.summary.writer.record_writer").RecordWriter
        number = len(list(folder.glob(f"{NAME}*")))
        self._path = folder / f"{NAME}{number:06d}"
        self._event, self._summary = events.Event, summaries.Summary
        self._written = begun if number else 0
        first: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        if number:
            status = events.SessionLog.SessionStatus.Value("START")
            session = events.SessionLog(status=status)
            first.append({"step": self._written, "session_log": session})
        self._append(first)

    def write(self, log: StepLog) -> None:
        """Write the steps that were added.

        Raises:
            OSError: the disk is full, say. A record may be there in part: the file is to be left.
        """
        contents = []
        for number, step in enumerate(log.since(self._written), self._written):
            values = [
                self._summary.Value(tag=tag, simple_value=value)
                for tag, value in _scalars(step).items()
                if isfinite(value)
            ]
            contents.append({"step": number, "summary": self._summary(value=values)})
        self._append(contents)
        self._written = len(log)

    def _append(self, contents: list[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        records = self._writer(buffer)
        for content in contents:
            records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        with self._path.open("ab", buffering=0) as file:
            file.write(buffer.getvalue())


def open_events(folder: Path, begun: int) -> Events | None:
    """What writes events; None where TensorBoard is not installed, or does not fit the installed
    protobuf.
    """
    if not is_installed("tensorboard"):
        return None
    try:
        return Events(folder, begun)
    except (ImportError, TypeError):
        return None


def _scalars(step: Step) -> dict[str, float]:
    """Tag -> value. A loss is also written under its noise level, of `BINS`."""
    found = {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "sigma": step.sigma,
        "skipped": float(not isfinite(step.loss)),
        "seconds": step.seconds,
    }
    for low, high in ((n / BINS, (n + 1) / BINS) for n in range(BINS)):
        if low < step.sigma <= high:
            found[f"loss_by_sigma/{low:g}-{high:g}"] = step.loss
    return found
