"""The newest stock onnxruntime, which reports its use unless told not to, stays silent here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_dit.app.run import HIDDEN

pytestmark = pytest.mark.devices

TRAIN = f"""
import sys
sys.modules.update(dict.fromkeys({(*HIDDEN, "matplotlib")!r}))  # a device has none of them
import edge_dit_runtime as er
import onnxruntime

run = er.train(*sys.argv[1:4], target="onnx", steps=2)
print(onnxruntime.__version__, run.done)
"""
NOWHERE = "http://127.0.0.1:9"
"""A proxy that does not answer, so that what the control would report goes nowhere."""


@pytest.fixture
def trained(made: Path, stock, tmp_path: Path):
    """Trains in a process with a home of its own; what onnxruntime left there."""

    def files(**environment: str) -> list[str]:
        home = tmp_path / "home"
        home.mkdir()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name != "ORT_DISABLE_TELEMETRY" and not name.startswith("XDG_")
        }
        paths = [stock(), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, made / "bundle", made / "bank", tmp_path / "run"],
            env={
                **inherited,
                "HOME": str(home),
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "https_proxy": NOWHERE,
                **environment,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        version, steps = done.stdout.split()
        assert tuple(map(int, version.split(".")[:2])) >= (1, 29), version
        assert steps == "2"
        found = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
        ours = Path(".cache", "edge-dit")  # digests of files
        return sorted(str(path) for path in found if not path.is_relative_to(ours))

    return files


def test_nothing_is_left_in_a_fresh_home(trained):
    assert trained() == []


def test_without_our_setting_files_are_left(trained):
    """So the test above can fail. The environment's own word is kept: "0" asks for reports."""
    assert any("onnxruntime" in name for name in trained(ORT_DISABLE_TELEMETRY="0"))
