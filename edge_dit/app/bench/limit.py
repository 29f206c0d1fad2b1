"""A process in little memory: a cgroup of its own, and files that are not in memory yet.

Linux only, with the right to make a cgroup: root, or a delegated one. Version 1 and 2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_dit.errors import BadInput
from edge_dit_runtime.room import groups

NO_SWAP = ("memory.memsw.limit_in_bytes", "memory.swap.max")
"""Files that forbid swap, where there is any: memory with swap is limited, or swap itself."""
DROP = Path("/proc/sys/vm/drop_caches")
WAIT = 2.0
"""Seconds that a cgroup may need to become empty."""


@contextmanager
def limited(limit: int) -> Iterator[list[str]]:
    """A cgroup that may hold ``limit`` bytes: anonymous memory, pages of files that its processes
    read, and the kernel's own for them.

    Yields:
        what to put in front of a command line so that it runs in the cgroup.

    Raises:
        BadInput: this system has no such cgroups, or does not let us make one.
    """
    group = _made(limit)
    procs = group / "cgroup.procs"
    try:
        yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs)]
    finally:
        until = time.monotonic() + WAIT
        while group.is_dir() and time.monotonic() < until:
            with suppress(OSError):  # busy, until its last process is gone
                group.rmdir()
            time.sleep(0.02)


def _made(limit: int) -> Path:
    reasons = []
    for parent, version in groups():
        group = parent / f"edge-dit-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            _write(group / version.limit, limit)
            for name, value in zip(NO_SWAP, (limit, 0), strict=True):
                if (group / name).exists():
                    _write(group / name, value)
            return group
        except OSError as error:
            reasons.append(f"{group.name}: {error.strerror or error}")
            with suppress(OSError):
                group.rmdir()
    raise BadInput(
        "--memory",
        found=f"no cgroup can be made ({'; '.join(reasons) or 'none is mounted'})",
        expected="Linux with cgroups of memory, and the right to make one",
        remedy="run it as root, or within `systemd-run --user --scope -p Delegate=yes`",
    )


def _write(path: Path, value: int) -> None:
    if not path.exists():  # a cgroup's folder takes no new files
        raise FileNotFoundError(2, "it has no such limit", str(path))
    path.write_text(str(value))


def drop_pages(paths: Iterable[Path]) -> str:
    """Let files' pages leave memory: they would be charged to whoever read them first, and a limit
    would mean nothing.

    Args:
        paths: files that the process is going to read; they are dropped where the system does not
            let us drop all.

    Returns:
        in words, what was dropped.
    """
    os.sync()
    try:
        DROP.write_text("1")
        return "all clean pages were dropped first"
    except OSError:
        pass
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "the bundle's pages were dropped first, those of Python and its libraries were not"
