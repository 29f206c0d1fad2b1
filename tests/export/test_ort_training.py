import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi import _pybind_state

import bundles
import tiny
from edge_dit.errors import BadInput
from edge_dit_export.targets.ort_training import _rank
from edge_dit_runtime.sessions.ort_training import OrtTrainingSession

pytestmark = pytest.mark.skipif(
    not hasattr(_pybind_state, "CheckpointState"), reason="stock onnxruntime, no training"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    sub, batch, opened = bundles.write(folder, "ort-training")
    return folder, sub, batch, opened


def test_trains_like_torch(bundle):
    _, _, _, opened = bundle
    sub, batch = tiny.subgraph()
    bundles.assert_trains_like_torch(OrtTrainingSession(opened), sub, batch)


def test_without_a_first_moment(tmp_path):
    bundles.assert_trains_without_a_first_moment(tmp_path, "ort-training")


def test_smooths_like_torch(bundle):
    _, _, _, opened = bundle
    sub, batch = tiny.subgraph()
    bundles.assert_smooths_like_torch(OrtTrainingSession(opened), sub, batch)


def test_resumes_bit_for_bit(bundle):
    _, _, batch, opened = bundle
    bundles.assert_resumes_bit_for_bit(lambda: OrtTrainingSession(opened), batch)


def test_state_before_the_first_step(bundle):
    _, _, batch, opened = bundle
    session = OrtTrainingSession(opened)
    state = session.state_dict()
    assert state["step"].tolist() == [0]
    draw = bundles.draws(batch, 1)[0]
    first = session.step(draw), session.adapter()
    session.load_state_dict(state)
    assert session.step(draw) == first[0]
    for name, value in session.adapter().items():
        np.testing.assert_array_equal(value, first[1][name], err_msg=name)


def test_clips_like_torch(bundle):
    _, _, batch, opened = bundle
    session = OrtTrainingSession(opened)
    draw = bundles.draws(batch, 1)[0]
    session.backward(draw)
    gradients = session.gradients()
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    session.update()
    moments = session.state_dict()
    factor = bundles.ADAMW.max_grad_norm / (norm + 1e-6)
    assert factor < 1
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            moments[f"exp_avg.{name}"], 0.1 * factor * gradient, rtol=1e-5, atol=1e-12
        )


def test_files_fit_the_last_runtime(bundle):
    folder, sub, _, opened = bundle
    for name in ("training_model", "eval_model", "optimizer_model", "patch_sampler"):
        model = ir.load(folder / "ort-training" / f"{name}.onnx")
        assert model.ir_version <= 10
        assert model.graph.opset_imports[""] <= 21
    frozen = opened.manifest.targets["ort-training"]["frozen"]
    assert not set(frozen) & set(sub.lora_parameters())
    lora_bytes = sum(p.numel() * 4 for p in sub.lora_parameters().values())
    assert (folder / "ort-training" / "checkpoint").stat().st_size < 2 * lora_bytes


def test_trains_without_torch(bundle):
    folder, _, batch, opened = bundle
    session = OrtTrainingSession(opened)
    bundles.assert_trains_without_torch(session, folder, "ort-training", batch)


def test_sampler_equals_interpolate(bundle):
    bundles.assert_samples_like_interpolate(bundle[0] / "ort-training" / "patch_sampler.onnx")


def test_no_paths_of_the_exporting_machine(bundle):
    folder, *_ = bundle
    for path in (folder / "ort-training").glob("*.onnx"):
        assert b"site-packages" not in path.read_bytes(), path.name


def test_stock_onnxruntime_is_told_apart(bundle, monkeypatch):
    _, _, _, opened = bundle
    monkeypatch.delattr(_pybind_state, "CheckpointState")
    with pytest.raises(BadInput, match=r"edge-dit\[ort-training\]"):
        OrtTrainingSession(opened)


def test_export_writes_nothing_to_stderr(tmp_path, capfd):
    bundles.write(tmp_path / "bundle", "ort-training")
    assert capfd.readouterr() == ("", "")


def test_b_must_be_told_from_a_for_a_rate_of_its_own():
    lora = {"to_q.lora_A.weight": torch.zeros(4, 9), "to_q.lora_B.weight": torch.zeros(9, 4)}
    assert _rank(lora) == 4
    lora |= {"to_v.lora_A.weight": torch.zeros(4, 9), "to_v.lora_B.weight": torch.zeros(4, 4)}
    with pytest.raises(BadInput, match=r"to_v\.lora_B\.weight with 4 rows"):
        _rank(lora)
