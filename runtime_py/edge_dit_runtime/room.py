"""How much memory this process may still take, as Linux and Android say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMINFO, OWN = Path("/proc/meminfo"), Path("/proc/self/cgroup")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Version:
    """How a version of cgroups says what memory a group holds.

    Attributes:
        root: where it is mounted.
        limit: file of the most bytes that a group may hold.
        usage: file of the bytes that it holds.
        files: line of memory.stat with the bytes of files' pages among them.
        shared: line with those that belong to no file on a disk.
    """

    root: Path
    limit: str
    usage: str
    files: str
    shared: str


V1 = Version(
    Path("/sys/fs/cgroup/memory"),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_cache",
    "total_shmem",
)
V2 = Version(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file", "shmem")


def groups() -> Iterator[tuple[Path, Version]]:
    """The cgroup of memory that this process is in, then those that it lies in."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version = V1 if "memory" in controllers.split(",") else V2 if number == "0" else None
        if version is None:
            continue
        own = version.root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(version.root) and folder.is_dir():
                yield folder, version


def room() -> int | None:
    """Bytes of memory that can still be taken, by pages of files too; None where nobody says.

    Pages of files that are there already count as room, because the system can drop them.
    """
    found = [_of_system(), *(_of_group(folder, version) for folder, version in groups())]
    return min((bytes_ for bytes_ in found if bytes_ is not None), default=None)


def held() -> int:
    """Bytes of anonymous memory that this process holds; 0 where nobody says."""
    return 1024 * _lines(STATUS).get("RssAnon:", 0)


def _of_system() -> int | None:
    available = _lines(MEMINFO).get("MemAvailable:")
    return None if available is None else available * 1024


def _of_group(folder: Path, version: Version) -> int | None:
    limit, usage = (_number(folder / name) for name in (version.limit, version.usage))
    if limit is None or usage is None:
        return None  # no limit, or no such controller here
    held = _lines(folder / "memory.stat")
    return max(0, limit - usage + held.get(version.files, 0) - held.get(version.shared, 0))


def _number(path: Path) -> int | None:
    try:
        words = path.read_text().strip()
    except OSError:
        return None
    return int(words) if words.isdigit() else None


def _lines(path: Path) -> dict[str, int]:
    """First word -> the number after it, of every line of a file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
