"""Every row of FAULTS.md, provoked for real: what the user is told, and what stays intact."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faulty
import numpy as np
import pytest
import small
from faulty import Crash, listing
from filelock import lock_descriptor

from edge_dit.contract import bank as banks
from edge_dit.contract.adapter import read_adapter, write_adapter_folder
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.certificate import (
    Certificate,
    Difference,
    Draws,
    TargetResult,
    write_certificate,
)
from edge_dit.errors import BadInput
from edge_dit.store import documents
from edge_dit.store.files import write_atomic, write_json
from edge_dit.store.locks import locked
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.run_folder import RunFolder
from edge_dit_runtime.training import MOST_SKIPPED, train
from run_folders import timeless

STEPS = 12


@pytest.fixture
def world(tmp_path, monkeypatch):
    """bank/ and bundle/ of a few numbers, trained by `small.SmallSession`."""
    monkeypatch.setattr("edge_dit_runtime.training.open_session", small.open_small)
    monkeypatch.setattr("edge_dit_runtime.training.SAVE_EVERY", 5)
    monkeypatch.setattr("edge_dit_runtime.run_folder.plot_losses", lambda *_: None)
    small.write_bank(tmp_path / "bank")
    small.write_bundle(tmp_path / "bundle")
    return tmp_path


def run(world, name="run", stop_after=None, **options):
    if stop_after is not None:
        first = []

        def stop(done, _loss):
            first.append(done)  # asked before each step
            return len(first) == stop_after + 1

        options["on_step"] = stop
    return train(world / "bundle", world / "bank", world / name, **options)


def final(world, name="run"):
    """What must come out the same, whatever happened on the way: all but times."""
    files = timeless(listing(world / name))
    return {n: data for n, data in files.items() if n != "run.json"}


# The disk


def test_full_disk_by_the_kernel(tmp_path, monkeypatch):
    """/dev/full is the system's own ENOSPC."""
    write_atomic(tmp_path / "a", "old")

    def full(dir, prefix):
        path = Path(dir) / f"{prefix}12345678"
        path.write_text("")
        return os.open("/dev/full", os.O_RDWR), str(path)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(BadInput, match=r"(?s)No space left on device.*free some space"):
        write_atomic(tmp_path / "a", "new" * 10000)
    assert listing(tmp_path) == {"a": b"old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system; where that is not permitted the test is left out."""
    places = []

    def mount(size, *options):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "t", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)


def test_full_disk_while_training(world, mounted):
    disk = mounted("128k")
    run(world, name=disk / "run", stop_after=5)
    kept = read_adapter_of(disk / "run")
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass
    with pytest.raises(BadInput, match=r"(?s)No space left on device.*free some space"):
        run(world, name=disk / "run", resume=True)
    assert read_adapter_of(disk / "run") == kept
    ballast.unlink()
    run(world, name=disk / "run", resume=True)
    run(world)
    assert read_adapter_of(disk / "run") == read_adapter_of(world / "run")


def read_adapter_of(folder):
    return {name: value.tobytes() for name, value in RunFolder(folder).adapter()[0].items()}


def test_read_only_file_system(world, mounted):
    disk = mounted("1m")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(BadInput, match=r"(?s)run.*Read-only file system.*another -o"):
        run(world, name=disk / "run")
    with pytest.raises(BadInput, match=r"(?s)lora.*Read-only file system.*another -o"):
        write_adapter_folder(disk / "lora", {}, 2, 2.0, "model")


AS_NOBODY = """
import os, sys
sys.path.insert(0, {tests!r})
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
from pathlib import Path
from edge_dit.store.files import write_atomic
try:
    write_atomic(Path({path!r}), "new")
except Exception as error:
    print(error)
"""


def test_permission_denied():
    """By another user, since root is denied nothing."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        folder = Path(name) / "closed"
        folder.mkdir()
        (folder / "a").write_text("old")
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        code = AS_NOBODY.format(tests=str(Path(__file__).parent), path=str(folder / "a"))
        code = "import edge_dit.store.files\n" + code  # before its folder is closed to us too
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "Permission denied" in done.stdout, done.stderr
        assert "remedy: make the folder writable" in done.stdout
        assert (folder / "a").read_text() == "old"


def test_a_file_where_a_folder_should_be(world):
    (world / "file").write_text("dear")
    with pytest.raises(BadInput):
        run(world, name="file")
    with pytest.raises(BadInput, match="cannot be written"):
        write_json(world / "file" / "a.json", {})
    assert (world / "file").read_text() == "dear"


def operations(write):
    """How many operations of the disk ``write`` takes."""
    with pytest.MonkeyPatch.context() as patch:
        disk = faulty.install(patch, None)
        write()
    return disk.count


@pytest.mark.parametrize("error", faulty.ERRORS, ids=[errno.errorcode[e] for e in faulty.ERRORS])
def test_any_operation_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a"
    count = operations(lambda: write_atomic(path, "old"))
    assert count >= 4
    for at in range(count):
        write_atomic(path, "old")
        with pytest.MonkeyPatch.context() as patch:
            faulty.install(patch, at, error)
            with pytest.raises(BadInput, match="cannot be written"):
                write_atomic(path, "new")
        # The last is the folder's sync: the rename before it has happened.
        assert path.read_text() == ("new" if at == count - 1 else "old")
        assert list(tmp_path.iterdir()) == [path]


def test_a_crash_at_any_operation_leaves_old_or_new(tmp_path):
    path = tmp_path / "a"
    for at in range(operations(lambda: write_atomic(path, "old"))):
        write_atomic(path, "old")
        with pytest.MonkeyPatch.context() as patch:
            faulty.install(patch, at)
            with pytest.raises(Crash):
                write_atomic(path, "new")
        assert path.read_text() in ("old", "new")


def test_a_run_that_crashes_at_any_operation_goes_on_to_the_same_bits(world):
    count = operations(lambda: run(world, name="whole"))
    want = final(world, "whole")
    assert count > 20
    for at in range(count):
        name = f"run-{at}"
        with pytest.MonkeyPatch.context() as patch:
            faulty.install(patch, at)
            with pytest.raises(Crash):
                run(world, name=name)
        run(world, name=name, resume=(world / name / "run.json").is_file())
        assert final(world, name) == want, at


def test_a_bank_that_crashes_at_any_operation_is_finished_to_the_same_bits(tmp_path):
    count = operations(lambda: small.write_bank(tmp_path / "whole"))
    for at in range(count):
        with pytest.MonkeyPatch.context() as patch:
            faulty.install(patch, at)
            with pytest.raises(Crash):
                small.write_bank(tmp_path / str(at))
        small.write_bank(tmp_path / str(at))
        assert listing(tmp_path / str(at)) == listing(tmp_path / "whole")


def test_what_a_killed_writer_left_is_swept(tmp_path):
    path = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        faulty.install(patch, 2)
        with pytest.raises(Crash):
            write_atomic(path, "new")
    left = next(tmp_path.iterdir())
    write_atomic(path, "old")
    assert left.exists()  # it could be that of a writer at work
    os.utime(left, (0, 0))
    with left.open("rb+") as held:
        assert lock_descriptor(held.fileno(), blocking=False)
        write_atomic(path, "old")
        assert left.exists()
    write_atomic(path, "old")
    assert list(tmp_path.iterdir()) == [path]


LORA = {
    "transformer.b.lora_A.weight": np.ones((2, 3), np.float32),
    "transformer.b.lora_B.weight": np.ones((3, 2), np.float32),
}


def test_a_folder_whose_making_crashes_is_old_or_new(tmp_path):
    def write(alpha):
        write_adapter_folder(tmp_path / "lora", LORA, 2, alpha, "model")

    write(1.0)
    old = listing(tmp_path / "lora")
    count = operations(lambda: write(2.0))
    new = listing(tmp_path / "lora")
    assert old != new
    for at in range(count):
        write(1.0)
        with pytest.MonkeyPatch.context() as patch:
            faulty.install(patch, at)
            with pytest.raises(Crash):
                write(2.0)
        there = listing(tmp_path / "lora") if (tmp_path / "lora").exists() else None
        assert there in (old, new, None)
        if there is None:  # between its two renames: the old one is put back first
            with contextlib.suppress(Crash), _whole(tmp_path / "lora"):
                assert listing(tmp_path / "lora") == old
                raise Crash
        write(2.0)
        assert listing(tmp_path / "lora") == new
        assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def _whole(target):
    from edge_dit.contract.adapter_formats import DIFFUSERS
    from edge_dit.store.files import whole_folder

    return whole_folder(target, DIFFUSERS.file)


def test_two_makers_of_one_folder(tmp_path):
    second = _whole(tmp_path / "lora")
    with _whole(tmp_path / "lora"), pytest.raises(BadInput, match="in use by another process"):
        second.__enter__()
    assert (tmp_path / "lora").is_dir()


# The bank


def test_half_a_bank(world):
    banks.shard_path(world / "bank", 1).unlink()
    with pytest.raises(BadInput, match=r"(?s)incomplete: 1 of 3 files.*shard-00001.*continues"):
        run(world)
    assert not (world / "run").exists()


def test_a_truncated_shard(world):
    path = banks.shard_path(world / "bank", 0)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadInput, match=r"(?s)shard-00000.*damaged.*precompute"):
        run(world)


def test_a_bank_of_another_model(world):
    shutil.rmtree(world / "bank")
    small.write_bank(world / "bank", plan_hash="f" * 64)
    with pytest.raises(BadInput, match=r"(?s)belongs to another plan.*precompute again"):
        run(world)


def test_an_edited_index(world):
    path = world / "bank" / "index.json"
    path.write_text(path.read_text().replace('"sigma": 0.5', '"sigma": 0.6', 1))
    with pytest.raises(BadInput, match="damaged or edited"):
        run(world)


def test_a_forged_draw_of_another_shape(world):
    shutil.rmtree(world / "bank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small.BATCH, "entry", (1, 5))
        small.write_bank(world / "bank")
    with pytest.raises(BadInput, match=r"(?s)entry: shape \(1, 5\).*expected: shape \(1, 4\)"):
        run(world)


# The bundle


def test_half_a_bundle(world):
    (world / "bundle" / "onnx" / "w.bin").unlink()
    with pytest.raises(BadInput, match=r"w\.bin: missing"):
        run(world)
    (world / "bundle" / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"no manifest\.json in it"):
        run(world)


def test_a_flipped_byte_in_a_weight(world):
    path = world / "bundle" / "onnx" / "w.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BadInput, match=r"(?s)w\.bin: damaged or replaced.*export it again"):
        run(world)
    assert not (world / "run").exists()


def test_an_edited_manifest(world):
    path = world / "bundle" / "manifest.json"
    path.write_text(path.read_text().replace('"lr": 0.01', '"lr": 0.02'))
    with pytest.raises(BadInput, match="damaged or edited"):
        run(world)


def test_a_newer_bundle(world):
    path = world / "bundle" / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    with pytest.raises(BadInput, match=r"(?s)schema version 3.*upgrade edge-dit"):
        run(world)


def test_an_adapter_of_another_rank(world):
    shutil.rmtree(world / "bundle")
    small.write_bundle(world / "bundle", rank=4)
    with pytest.raises(BadInput, match=r"(?s)lora_A.*shape \(4, 3\).*expected: shape \(2, 3\)"):
        run(world)
    assert not (world / "run").exists()


def test_a_forged_graph_that_reads_the_users_files(world):
    shutil.rmtree(world / "bundle")
    small.write_bundle(world / "bundle", location="/etc/passwd")
    with pytest.raises(BadInput, match=r"(?s)its weights lie in '/etc/passwd'.*do not use"):
        run(world)


def result(relative: float) -> TargetResult:
    loss = Difference("loss", "loss", relative, relative, 1.0, relative, 1e-4)
    return TargetResult(Draws([0], [], [0]), [loss])


def test_a_forged_verdict_does_not_count(world, capsys):
    """What follows from the differences is not read from the file."""
    bundle = open_bundle(world / "bundle")
    results = {"onnx": result(1e-3)}
    write_certificate(bundle, Certificate(bundle.manifest_sha256, "torch", 1, results))
    path = bundle.folder / "parity.json"
    path.write_text(path.read_text().replace('"passed": false', '"passed": true'))
    run(world)
    assert "says that onnx failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        (None, "no parity certificate"),
        ({"manifest_sha256": "0"}, "belongs to another export"),
        ({"targets": {"executorch": result(1e-9)}}, "has no result of onnx"),
        ({"targets": {"onnx": result(1e-3)}}, "says that onnx failed"),
        ({"targets": {"onnx": result(1e-9)}, "changed_files": ["a"]}, "says that files changed"),
        ({"targets": {"onnx": result(1e-9)}}, ""),
    ],
)
def test_a_bundle_without_a_certificate_of_its_own_is_warned_of(world, capsys, certificate, words):
    if certificate:
        bundle = open_bundle(world / "bundle")
        facts = {"manifest_sha256": bundle.manifest_sha256, "targets": {}, **certificate}
        write_certificate(bundle, Certificate(reference="torch", steps=1, **facts))
    run(world)
    said = capsys.readouterr().err
    assert words in said
    assert ("warning" in said) is bool(words)


# The run


HOLD = """
import sys, time
from pathlib import Path
from edge_dit.store.locks import locked
folder = Path(sys.argv[1])
with locked(folder / ".lock", folder):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_on_one_run(world):
    """And the lock of one that was killed is nobody's."""
    run(world, stop_after=5)
    before = listing(world / "run")
    command = [sys.executable, "-c", HOLD, world / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=r"(?s)run: in use by another process.*stop it"):
            run(world, resume=True)
        assert listing(world / "run") == before
        other.kill()
    assert (world / "run" / ".lock").exists()
    assert run(world, resume=True).done == STEPS
    assert not (world / "run" / ".lock").exists()


def test_a_lock_that_was_removed_by_its_holder_is_taken_anew(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    real, calls = os.open, []

    def slow(*args):
        descriptor = real(*args)
        if not calls:
            calls.append(path.unlink())  # the holder lets go between our open and our lock
        return descriptor

    monkeypatch.setattr("edge_dit.store.locks.os.open", slow)
    with locked(path, "x"):
        assert path.exists()


def test_a_run_that_was_killed_before_its_first_checkpoint(world):
    def die(done, _loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(world, on_step=die)
    assert sorted(listing(world / "run")) == ["run.html", "run.json", "settings.json"]
    assert RunFolder(world / "run").read().done == 0
    with pytest.raises(BadInput, match="no whole checkpoint"):
        RunFolder(world / "run").adapter()
    run(world, resume=True)
    run(world, name="whole")
    assert final(world) == final(world, "whole")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_checkpoint(world, size):
    run(world, stop_after=5)
    path = world / "run" / "state.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(BadInput, match=r"(?s)damaged checkpoint.*start a new run"):
        run(world, resume=True)


def test_every_flipped_byte_of_a_checkpoint(world):
    run(world, stop_after=5)
    path = world / "run" / "state.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 2
        path.write_bytes(changed)
        with pytest.raises(BadInput, match="damaged checkpoint"):
            run(world, resume=True)
    path.write_bytes(whole)
    assert run(world, resume=True).done == STEPS


def test_a_lost_loss_table_is_written_again(world):
    run(world, stop_after=5)
    (world / "run" / "loss.csv").write_text("nonsense")
    run(world, resume=True)
    run(world, name="whole")
    assert final(world) == final(world, "whole")


def test_a_lost_or_strange_run_json(world):
    run(world, stop_after=5)
    path = world / "run" / "run.json"
    whole = path.read_text()
    for content in (whole.replace('"rank": 2', '"rank": 3'), whole[:40], "[]", "{}", ""):
        path.write_text(content)
        with pytest.raises(BadInput):
            run(world, resume=True)
    path.unlink()
    with pytest.raises(BadInput, match=r"no run\.json in it"):
        run(world, resume=True)
    path.write_text(whole)
    assert run(world, resume=True).done == STEPS


@pytest.mark.parametrize("other", ["bank", "bundle"])
def test_a_checkpoint_of_another_bundle_or_bank(world, other):
    run(world, stop_after=5)
    if other == "bank":
        shutil.rmtree(world / "bank")
        small.write_bank(world / "bank", seed=1)
    else:
        manifest = open_bundle(world / "bundle").manifest
        small.write_manifest(world / "bundle", manifest.model_copy(update={"tools": {"x": "1"}}))
    before = listing(world / "run")
    with pytest.raises(BadInput, match=r"(?s)a run of target onnx.*it was started with"):
        run(world, resume=True)
    assert listing(world / "run") == before


def test_the_state_of_another_run_in_this_runs_folder(world):
    run(world, stop_after=5)
    shutil.rmtree(world / "bank")
    small.write_bank(world / "bank", seed=1)
    run(world, name="other", stop_after=5)
    shutil.copy(world / "run" / "state.safetensors", world / "other")
    with pytest.raises(BadInput, match="it was started with"):
        run(world, name="other", resume=True)


def test_a_checkpoint_that_does_not_say_what_it_belongs_to(world):
    run(world, stop_after=5)
    path = world / "run" / "state.safetensors"
    from safetensors.numpy import save_file

    save_file(TensorFile(path).read(), path, {"done": "5"})
    with pytest.raises(BadInput, match=r"(?s)does not say what it belongs to.*start a new run"):
        run(world, resume=True)


class Poisoned(small.SmallSession):
    """Loss and gradients are not finite on some draws."""

    bad: frozenset = frozenset()
    what = "loss"

    def backward(self, draw):
        loss = super().backward(draw)
        number = Poisoned.numbers.index(draw["entry"].tobytes())
        if number not in self.bad:
            return loss
        self._gradients = {n: np.full_like(g, np.inf) for n, g in self._gradients.items()}
        return float("nan") if self.what == "loss" else loss


@pytest.fixture
def poisoned(world, monkeypatch):
    Poisoned.numbers = [draw["entry"].tobytes() for draw in Bank(world / "bank")]
    monkeypatch.setattr(
        "edge_dit_runtime.training.open_session", lambda bundle, *_: Poisoned(bundle.manifest)
    )
    return monkeypatch


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_draw_that_is_not_finite_is_skipped_and_named(world, poisoned, capsys, what):
    poisoned.setattr(Poisoned, "bad", frozenset({2}))
    poisoned.setattr(Poisoned, "what", what)
    run(world)
    assert "skipped: draw 2 (image a.png, sigma 0.500)" in capsys.readouterr().err
    table = (world / "run" / "loss.csv").read_text()
    assert table.count("nan") == 2  # two epochs
    tensors, _ = RunFolder(world / "run").adapter()
    assert all(np.isfinite(value).all() for value in tensors.values())
    run(world, name="stopped", stop_after=4)
    run(world, name="stopped", resume=True)
    assert final(world) == final(world, "stopped")


def test_training_that_is_never_finite_stops_and_keeps_its_checkpoint(world, poisoned):
    run(world, stop_after=5, steps=100)
    kept = read_adapter_of(world / "run")
    poisoned.setattr(Poisoned, "bad", frozenset(range(6)))
    words = f"(?s){MOST_SKIPPED} steps in a row.*the last on draw .*image a.png.*lower lr"
    with pytest.raises(BadInput, match=words):
        run(world, resume=True)
    assert read_adapter_of(world / "run") == kept


def test_an_adapter_that_overflowed_does_not_replace_the_checkpoint(world, monkeypatch):
    run(world, stop_after=5)
    kept = read_adapter_of(world / "run")

    def overflow(self):
        self._adapter = {name: value * np.inf for name, value in self._adapter.items()}

    monkeypatch.setattr(small.SmallSession, "update", overflow)
    with pytest.raises(BadInput, match=r"(?s)diverged.*the last checkpoint is kept"):
        run(world, resume=True, stop_after=1)
    assert read_adapter_of(world / "run") == kept


# The host


def images_of(workplace, folder):
    from edge_dit.pictures.dataset import read_folder

    shutil.copytree(workplace / "images", folder)
    return lambda: read_folder(folder, "a sks toy", 64)


def test_a_vanished_image(workplace, plan, tmp_path, monkeypatch):
    """Between listing and reading; and between a bank's first half and its second."""
    from edge_dit.pictures.folder import list_folder
    from edge_dit.reference.precompute import precompute

    read = images_of(workplace, tmp_path / "images")
    precompute(plan, read(), tmp_path / "bank")
    banks.shard_path(tmp_path / "bank", 0).unlink()
    before = listing(tmp_path / "bank")
    gone = sorted((tmp_path / "images").glob("*.png"))[0]
    data = gone.read_bytes()
    listed, seen = list_folder(tmp_path / "images"), read()
    gone.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("edge_dit.pictures.dataset.list_folder", lambda *_: listed)
        with pytest.raises(BadInput, match=f"{gone.name}: not a readable image"):
            read()
    with pytest.raises(BadInput, match=f"{gone.name}: not a readable image"):
        precompute(plan, seen, tmp_path / "bank")
    with pytest.raises(BadInput, match="a bank of another plan, other images"):
        precompute(plan, read(), tmp_path / "bank")
    assert listing(tmp_path / "bank") == before
    gone.write_bytes(data)
    precompute(plan, read(), tmp_path / "bank")
    assert len(list(Bank(tmp_path / "bank"))) == plan.draws


def test_a_model_that_changed_since_the_plan(workplace, plan, tmp_path):
    from edge_dit.reference.precompute import precompute

    shutil.copytree(workplace / "model", tmp_path / "model")
    path = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    moved = plan.model_copy(update={"model": tmp_path / "model"})
    with pytest.raises(BadInput, match=r"(?s)other weights than the plan was made for.*plan again"):
        precompute(moved, [], tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_a_slow_disk_is_only_slow(world, monkeypatch):
    real = os.fsync
    monkeypatch.setattr("edge_dit.store.files.os.fsync", lambda f: time.sleep(0.05) or real(f))
    run(world)
    assert RunFolder(world / "run").read().done == STEPS
    assert json.loads((world / "run" / "run.json").read_text())["done"] == STEPS
    assert documents.read_document(world / "run" / "run.json", "", "")["steps"] == STEPS
    assert read_adapter(world / "run" / "adapter.safetensors")[1] == 2
