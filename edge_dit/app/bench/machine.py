"""The machine a benchmark ran on, and whether it had something else to do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_dit.app.doctor import package_versions

BUSY = 0.5
"""Load average per core above which timings are not to be trusted."""


@dataclass(frozen=True)
class Machine:
    """Where, when and with which versions something was measured.

    Attributes:
        processor: its name.
        cores: logical cores.
        system: operating system and architecture, "Linux x86_64".
        python: version.
        load_average: mean number of running processes in the minute before; None on Windows.
        date: UTC, ISO 8601.
        versions: package -> version; None for a package that is not installed.
    """

    processor: str
    cores: int
    system: str
    python: str
    load_average: float | None
    date: str
    versions: dict[str, str | None]


def this_machine() -> Machine:
    """The machine that runs this process, and what it does now."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
    )


def busy_warning(machine: Machine) -> str | None:
    """One line for a machine whose load average is above `BUSY` per core; else None."""
    load = machine.load_average
    if load is None or load <= BUSY * machine.cores:
        return None
    return (
        f"warning: other work is running (load average {load:.1f} on {machine.cores} cores): "
        "times will be too long, and ratios unreliable"
    )


def _processor() -> str:
    """The processor's name; Linux gives it in /proc only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
