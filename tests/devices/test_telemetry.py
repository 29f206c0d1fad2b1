"""The newest stock onnxruntime, which reports its use unless told not to, stays silent here."""

import sys
from pathlib import Path

import pytest
from machines import Machine

pytestmark = pytest.mark.devices

TRAIN = """
import edge_dit_runtime as er
import onnxruntime

run = er.train({bundle!r}, {bank!r}, "run", target="onnx", steps=2)
print(onnxruntime.__version__, run.done)
"""
NOWHERE = "http://127.0.0.1:9"
"""A proxy that does not answer, so that what the control would report goes nowhere."""

CI = [
    "CI",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "TF_BUILD",
    "CIRCLECI",
    "TRAVIS",
    "APPVEYOR",
    "BUILDKITE",
    "JENKINS_URL",
    "TEAMCITY_VERSION",
    "CODEBUILD_BUILD_ID",
    "BUILD_NUMBER",
]
"""Where one of these is set, onnxruntime reports nothing by itself (its pull request 27379): both
tests would say nothing of a user's machine."""


@pytest.fixture(params=["x86", "arm"])
def trained(request, made: Path, stock, tmp_path: Path, monkeypatch):
    """Trains in a process with a home of its own; what onnxruntime left there."""
    # Importing edge_dit set it in this process.
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", *CI):
        monkeypatch.delenv(name, raising=False)

    def files(**environment: str) -> list[str]:
        home = tmp_path / "home"
        home.mkdir()
        if request.param == "arm":
            machine = request.getfixturevalue("arm")
        else:
            machine = Machine(Path(sys.executable), (stock(),))
        code = TRAIN.format(bundle=str(made / "bundle"), bank=str(made / "bank"))
        environment = {"HOME": str(home), "https_proxy": NOWHERE, **environment}
        version, steps = machine.run(code, tmp_path, **environment).split()
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
