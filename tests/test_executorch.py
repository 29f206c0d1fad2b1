import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("executorch_child.py")
CHECKS = [
    element.id
    for node in ast.parse(CHILD.read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "CHECKS"
    for element in node.value.elts
]
"""Read, not imported: ExecuTorch stays out of this process."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("executorch")
    done = subprocess.run(
        [sys.executable, CHILD, folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(CHILD.parent)},
    )
    path = folder / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found, f"exit code {done.returncode}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("check", CHECKS)
def test_programs(results, check):
    found, ending = results
    assert check in found, f"the process ended before this check: {ending}"
    assert found[check] is None, found[check]
