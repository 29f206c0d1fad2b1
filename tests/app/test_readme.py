"""The promises of README and docs/bundle.md that can be run."""

import json
import os
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
BUNDLE = (ROOT / "docs" / "bundle.md").read_text()


def test_the_bare_session_example_runs(road, monkeypatch):
    monkeypatch.chdir(road.folder)
    (example,) = re.findall(r"```python\n(.*?)```", BUNDLE, re.DOTALL)
    found: dict = {}
    exec(example, found)
    assert found["loss"] > 0
    assert len(found["gradients"]) == len(found["lora"])
    assert any(abs(gradient).max() > 0 for gradient in found["gradients"])


def test_the_api_example_goes_from_a_job_to_an_adapter(workplace, tmp_path, monkeypatch):
    for name in ("model", "images"):
        os.symlink(workplace / name, tmp_path / name)
    shutil.copy(workplace / "job.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(abs(value).max() > 0 for name, value in tensors.items() if "lora_B" in name)


def test_the_api_document_walks_the_same_road():
    (whole, steps) = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
    compile(steps, "docs/api.md", "exec")
    called = re.findall(r"\b(e[dr]\.\w+)\(", whole)
    (readme,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert called == re.findall(r"\b(e[dr]\.\w+)\(", readme)


def test_its_losses_are_those_of_the_stored_run():
    losses = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())["losses"]
    words = " ".join(README.split())
    assert f"held-out loss {losses['before']:.4f} before, {losses['onnx']:.4f} after" in words
    assert f"{losses['full LoRA']:.4f} for LoRA on all blocks" in words


def test_it_is_short():
    assert len(README.splitlines()) <= 130
