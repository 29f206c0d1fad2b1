"""How much memory a process may still take, and what the streamed layout makes of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_dit.app.bench.limit import drop_pages, limited
from edge_dit.errors import BadInput
from edge_dit_runtime import room
from edge_dit_runtime.sessions import mapped

MIB = 2**20


def group(folder: Path, version: room.Version, limit: str, usage: int, stat: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / version.limit).write_text(f"{limit}\n")
    (folder / version.usage).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)
    return folder


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A made-up system with 1 GiB free and no cgroups."""
    (tmp_path / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable:    1048576 kB\n")
    (tmp_path / "cgroup").write_text("")
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "OWN", tmp_path / "cgroup")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "version"), [("5:cpu,memory:/app\n", room.V1), ("0::/app\n", room.V2)]
)
def test_the_tightest_group_counts(system, monkeypatch, line, version):
    root = system / "groups"
    monkeypatch.setattr(room, "V1" if version is room.V1 else "V2", replace(version, root=root))
    (system / "cgroup").write_text(f"7:freezer:/\n{line}")
    pages = f"{version.files} {30 * MIB}\n{version.shared} {10 * MIB}\n"
    group(root / "app", version, str(256 * MIB), 100 * MIB, pages)
    assert room.room() == (256 - 100 + 20) * MIB  # shared pages lie on no disk
    group(root, version, str(200 * MIB), 150 * MIB, pages)
    assert room.room() == (200 - 150 + 20) * MIB
    group(root, version, "max", 150 * MIB, pages)
    assert room.room() == (256 - 100 + 20) * MIB
    group(root / "app", version, str(64 * MIB), 100 * MIB, "")
    assert room.room() == 0


def test_without_groups_the_system_counts(system):
    assert room.room() == 2**30
    (system / "meminfo").unlink()
    assert room.room() is None


@pytest.mark.parametrize(
    ("free", "loaded", "ahead"),
    [(None, True, True), (10 * MIB, True, True), (2 * MIB, True, False), (MIB, False, False)],
)
def test_tensors_are_loaded_where_there_is_room(tmp_path, monkeypatch, free, loaded, ahead):
    save_file({"w": np.ones(MIB, np.uint8)}, tmp_path / "w.safetensors")
    tensors = mapped.MappedTensors(tmp_path / "w.safetensors")
    told = []
    monkeypatch.setattr(mapped, "room", lambda: free)
    monkeypatch.setattr(mapped._MappedFile, "advise", lambda *a: told.append(a[2]))
    tensors.fetch(["w"])
    assert bool(told) == loaded
    told.clear()
    tensors.fetch_ahead(["w"])
    tensors._reader.shutdown()
    assert bool(told) == ahead


def in_a_group(limit: int, code: str) -> subprocess.CompletedProcess:
    try:
        with limited(limit) as within:
            drop_pages([])
            command = [*within, sys.executable, "-c", code]
            return subprocess.run(command, capture_output=True, text=True)
    except BadInput as fault:
        pytest.skip(str(fault))


def test_a_limit_is_seen_and_enforced():
    held = "from edge_dit_runtime.room import room; print(room())"
    assert 0 < int(in_a_group(128 * MIB, held).stdout) < 128 * MIB
    assert in_a_group(64 * MIB, "x = b'1' * (200 << 20)").returncode != 0
    assert in_a_group(400 * MIB, "x = b'1' * (200 << 20)").returncode == 0


def test_without_the_right_to_make_a_group_it_says_so(system):
    with pytest.raises(BadInput, match="no cgroup can be made"), limited(MIB):
        pass
