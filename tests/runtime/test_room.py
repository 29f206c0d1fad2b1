"""How much memory a process may still take, and what the streamed layout makes of it."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_dit.app.bench.limit import drop_pages, limited
from edge_dit.budget.footprint import REFERENCE, footprints_of
from edge_dit.contract.bundle import open_bundle, write_manifest
from edge_dit.contract.targets import TargetVariant
from edge_dit.errors import BadInput
from edge_dit_runtime import room, session
from edge_dit_runtime.sessions import mapped
from edge_dit_runtime.training import train

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


# ---------------------------------------------------------------- what a bundle says it needs


@pytest.fixture
def little(monkeypatch):
    """1 MB of memory is free, and this process holds none."""
    monkeypatch.setattr(session, "room", lambda: 10**6)
    monkeypatch.setattr(session, "held", lambda: 0)


def test_an_export_says_what_each_layout_takes(road):
    bundle = open_bundle(road.bundle)
    assert bundle.facts("onnx").memory.keys() == set(bundle.layouts("onnx"))
    footprints = footprints_of(road.plan, REFERENCE)
    trained = tuple(road.plan.trained)
    for layout, bytes_ in bundle.facts("onnx").memory.items():
        way = TargetVariant("onnx", layout)
        assert bytes_ == footprints.of(trained, road.plan.rank, way, road.plan.tail).anonymous


def test_a_layout_that_takes_more_than_is_free_is_refused(road, little, tmp_path):
    with pytest.raises(BadInput) as caught:
        train(road.bundle, road.bank, tmp_path / "run", target="onnx")
    fault = caught.value
    assert fault.found == "1 MB of memory free"
    needs = open_bundle(road.bundle).facts("onnx").memory["fused"]
    assert fault.expected == f"about {needs / 1e6:,.0f} MB for onnx"
    assert fault.remedy.startswith("take --target onnx:streamed, or")
    assert "--any-memory" in fault.remedy
    assert not (tmp_path / "run").exists()
    forced = train(
        road.bundle, road.bank, tmp_path / "run", target="onnx", steps=1, any_memory=True
    )
    assert forced.done == 1


def test_the_streamed_layout_is_never_refused(road, little, tmp_path):
    streamed = train(road.bundle, road.bank, tmp_path / "run", target="onnx:streamed", steps=1)
    assert streamed.done == 1


def test_what_the_process_holds_already_counts(road, little, monkeypatch):
    bundle = open_bundle(road.bundle)
    needs = bundle.facts("onnx").memory["fused"]
    monkeypatch.setattr(session, "held", lambda: needs - 10**6)
    session.check_room(bundle, "onnx", "fused")
    monkeypatch.setattr(session, "held", lambda: needs - 10**6 - 1)
    with pytest.raises(BadInput, match="1 MB of memory free"):
        session.check_room(bundle, "onnx", "fused")


def test_where_bundle_or_system_says_nothing_nothing_is_refused(road, little, monkeypatch):
    bundle = open_bundle(road.bundle)
    older = {**bundle.manifest.targets["onnx"]}
    del older["memory"]
    manifest = bundle.manifest.model_copy(update={"targets": {"onnx": older}})
    session.check_room(replace(bundle, manifest=manifest), "onnx", "fused")
    monkeypatch.setattr(session, "room", lambda: None)
    session.check_room(bundle, "onnx", "fused")


def test_in_a_group_a_layout_is_refused_that_would_be_killed(road, tmp_path):
    """A bundle that says it needs 400 MB."""
    bundle = shutil.copytree(road.bundle, tmp_path / "bundle")
    manifest = open_bundle(bundle).manifest
    manifest.targets["onnx"]["memory"]["fused"] = 400 * MIB
    write_manifest(bundle, manifest)
    words = ["edge-dit", "train", bundle, "--bank", road.bank, "-o", tmp_path / "run"]
    words += ["--steps", 1, "--target", "onnx"]
    code = "import sys; sys.argv = {}; from edge_dit.cli import main; main()"
    asked = code.format(list(map(str, words)))
    refused = in_a_group(256 * MIB, asked)
    assert refused.returncode == 2, refused.stderr
    assert "MB of memory free" in refused.stderr
    assert in_a_group(1024 * MIB, asked).returncode == 0


def test_without_the_right_to_make_a_group_it_says_so(system):
    with pytest.raises(BadInput, match="no cgroup can be made"), limited(MIB):
        pass
