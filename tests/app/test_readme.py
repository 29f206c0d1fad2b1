"""The promises of README and docs/bundle.md that can be run."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BUNDLE = (ROOT / "docs" / "bundle.md").read_text()


def test_the_bare_session_example_runs(road, monkeypatch):
    monkeypatch.chdir(road.folder)
    (example,) = re.findall(r"```python\n(.*?)```", BUNDLE, re.DOTALL)
    found: dict = {}
    exec(example, found)
    assert found["loss"] > 0
    assert len(found["gradients"]) == len(found["lora"])
    assert any(abs(gradient).max() > 0 for gradient in found["gradients"])


def test_the_job_file_in_it_is_a_job(road, tmp_path):
    from edge_dit.planning.job import read_job

    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "tiny-sana").mkdir()
    (tmp_path / "subject" / "train").mkdir(parents=True)
    (tmp_path / "job.toml").write_text(text)
    assert read_job(tmp_path / "job.toml").train.resolution == 128
