"""A few kills of every stage; `kill.py` does as many as one likes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill import STAGES, difference, shares

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill.py forks")


@pytest.mark.slow
def test_killed_stages_end_at_the_same_files(workplace, made, tmp_path):
    for folder, names in ((workplace, ("job.toml", "model", "images")), (made, ("plan.json",))):
        for name in names:
            (tmp_path / name).symlink_to(folder / name)
    for name in ("bank", "bundle"):
        (tmp_path / name).symlink_to(made / name)
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "7", "--world", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for stage in STAGES:
        assert f"{stage}: " in done.stdout
    assert done.stdout.count(" 0 wrong") == len(STAGES)


def test_kills_are_shared_out():
    for kills in (4, 7, 200):
        found = shares(kills, list(STAGES))
        assert sum(found.values()) == kills
        assert min(found.values()) >= 1
    assert shares(10, ["export"]) == {"export": 10}
    assert shares(10, ["train"]) == {"train": 10}


def test_a_difference_is_told():
    assert difference({"a": b"1"}, {"a": b"1"}) == ""
    assert difference({"a": b"1"}, {"a": b"2"}) == "a differs"
    assert difference({"a": b"1"}, {}) == "a is there in one run only"
