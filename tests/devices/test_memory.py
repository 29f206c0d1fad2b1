"""A device with little memory: training in a cgroup, with no page of a file in memory before."""

import subprocess
import sys
from pathlib import Path

import pytest

from edge_dit.app.bench.limit import drop_pages, limited
from edge_dit.errors import BadInput

pytestmark = pytest.mark.devices
LIMIT = 128 * 2**20


def train(road, folder, within=()):
    command = [str(Path(sys.executable).with_name("edge-dit")), "train", str(road.bundle)]
    command += ["--bank", str(road.bank), "-o", str(folder), "--target", "onnx:streamed"]
    done = subprocess.run([*within, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_small_bundle_trains_in_128_mib_to_the_same_bits(road, tmp_path):
    train(road, tmp_path / "free")
    try:
        with limited(LIMIT) as within:
            drop_pages([])
            train(road, tmp_path / "limited", within)
    except BadInput as fault:
        pytest.skip(str(fault))
    one, other = (tmp_path / name / "adapter.safetensors" for name in ("free", "limited"))
    assert one.read_bytes() == other.read_bytes()


def test_a_limit_far_too_small_ends_it(road, tmp_path):
    try:
        with limited(LIMIT // 4) as within, pytest.raises(AssertionError):
            train(road, tmp_path / "run", within)
    except BadInput as fault:
        pytest.skip(str(fault))
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
