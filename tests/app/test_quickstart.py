"""The whole road in one call, on the small pipeline."""

import json

import pytest
from PIL import Image

from edge_dit.app.quickstart import loss_table, quickstart
from edge_dit.errors import BadInput


@pytest.mark.slow
def test_quickstart_leaves_everything_and_can_be_repeated(road, tmp_path):
    out = tmp_path / "out"
    alone = quickstart(road.job, out, "onnx", print)
    assert set(alone["losses"]) == {"before", "onnx"}
    for _ in range(2):  # adding to what is there, and again
        quickstart(road.job, out, None, print, compare=True)
    assert json.loads((out / "bundle" / "parity.json").read_text())["passed"]
    for name in ("before.png", "after.png", "full-lora.png"):
        with Image.open(out / name) as sheet:
            assert sheet.width > 0
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (out / "lora-executorch" / "pytorch_lora_weights.safetensors").is_file()
    losses = json.loads((out / "losses.json").read_text())["losses"]
    assert losses["onnx"] != losses["before"]
    # There is no folder of held-out images beside this job's.
    assert "loss on the training pictures" in (out / "losses.md").read_text()


def test_a_target_that_the_job_does_not_export_leaves_nothing(road, tmp_path):
    with pytest.raises(BadInput, match="does not export"):
        quickstart(road.job, tmp_path / "out", "onnx:recompute", print)
    assert not (tmp_path / "out").exists()


def test_loss_table_gives_the_share_of_full_lora():
    table = loss_table({"before": 2.0, "onnx": 1.25, "full LoRA": 1.0}, 7, "held-out loss")
    assert "| onnx | 1.2500 | 75% |" in table
    assert "held-out loss" in table
