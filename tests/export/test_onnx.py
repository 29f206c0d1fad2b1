import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import bundles
import tiny
from edge_dit.errors import BadInput
from edge_dit_export.graph import optimizer
from edge_dit_export.graph.optimizer import AdamWStep
from edge_dit_export.targets.onnx_model import onnx_model
from edge_dit_runtime.session import open_session
from edge_dit_runtime.sessions.onnx_program import OnnxProgram, OnnxUpdate

FILES = ("train_step", "optimizer", "patch_sampler")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    sub, batch, opened = bundles.write(folder, "onnx")
    return folder, sub, batch, opened


def test_trains_like_torch(bundle):
    _, _, _, opened = bundle
    sub, batch = tiny.subgraph()
    bundles.assert_trains_like_torch(open_session(opened, "onnx"), sub, batch)


def test_without_a_first_moment(tmp_path):
    bundles.assert_trains_without_a_first_moment(tmp_path, "onnx")


def test_smooths_like_torch(bundle):
    _, _, _, opened = bundle
    sub, batch = tiny.subgraph()
    bundles.assert_smooths_like_torch(open_session(opened, "onnx"), sub, batch)


def test_resumes_bit_for_bit(bundle):
    _, _, batch, opened = bundle
    bundles.assert_resumes_bit_for_bit(lambda: open_session(opened, "onnx"), batch)


@pytest.mark.parametrize("name", FILES)
def test_standard_operators_only(bundle, name):
    path = bundle[0] / "onnx" / f"{name}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version <= 21) for entry in model.opset_import] == [("", True)]
    assert model.ir_version <= 10
    assert not model.functions
    assert b"site-packages" not in path.read_bytes(), "paths of the exporting machine"


@pytest.mark.parametrize("name", FILES)
def test_shapes_are_inferred(bundle, name):
    model = onnx.load(bundle[0] / "onnx" / f"{name}.onnx")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {value.name for value in inferred.graph.value_info}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        assert set(filter(None, node.output)) <= known | outputs, node.name


def test_names_follow_the_contract(bundle):
    folder, sub, batch, opened = bundle
    lora = list(sub.lora_parameters())
    names = {}
    for name in FILES:
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")
        inputs = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        assert opened.manifest.targets["onnx"]["graphs"][f"{name}.onnx"] == {
            "inputs": inputs,
            "outputs": outputs,
        }
        names[name] = inputs, outputs
    assert names["train_step"] == ([*batch, *lora], ["loss", *(f"grad.{n}" for n in lora)])
    kinds = ("", "grad.", "exp_avg.", "exp_avg_sq.")
    assert names["optimizer"] == (
        ["lr", "step", *(kind + n for kind in kinds for n in lora)],
        [f"new.{kind}{n}" for kind in ("", "exp_avg.", "exp_avg_sq.") for n in lora],
    )
    assert names["patch_sampler"] == (["image", "sigma", "uv"], ["patch"])


def test_frozen_weights_are_stored_once(bundle):
    folder, sub, _, _ = bundle
    frozen = sum(p.numel() * 4 for p in sub.parameters() if not p.requires_grad)
    kernels = sum(p.numel() * 4 for n, p in sub.named_parameters() if n.endswith("depth.weight"))
    # The gradient of a depthwise convolution has the kernel turned round, a copy; no other large
    # constant is stored beside the weights, by none of the layouts.
    layouts = ("train_step.onnx", "train_step.recompute.onnx")
    for name in layouts:
        assert (folder / "onnx" / f"{name}.data").stat().st_size <= kernels + 64 * 4096
    stored = (folder / "onnx" / "frozen.safetensors").stat().st_size
    assert frozen <= stored <= frozen + 20_000  # its header
    graphs = sum(path.stat().st_size for path in (folder / "onnx").glob("*.onnx"))
    assert graphs < 4_000_000


def test_optimizer_equals_its_module(bundle):
    folder, sub, _, _ = bundle
    shapes = {name: p.shape for name, p in sub.lora_parameters().items()}
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(shape, generator=generator) for _ in range(4) for shape in shapes.values()]
    state[3 * len(shapes) :] = [value.abs() for value in state[3 * len(shapes) :]]
    arguments = [torch.tensor([1e-3]), torch.tensor([6.0]), *state]
    session = onnxruntime.InferenceSession(folder / "onnx" / "optimizer.onnx")
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, (a.numpy() for a in arguments), strict=True)))
    for want, have in zip(AdamWStep(bundles.ADAMW, shapes)(*arguments), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=1e-6, atol=1e-7)


def test_an_update_takes_the_place_of_the_old_state(bundle, monkeypatch):
    folder, _, _, opened = bundle
    monkeypatch.setattr(optimizer, "TOGETHER", 300)  # several groups, one after the other
    sub, _ = tiny.subgraph()
    traced = optimizer.trace_optimizer(
        AdamWStep(bundles.ADAMW, {name: p.shape for name, p in sub.lora_parameters().items()})
    )
    path = folder / "grouped.onnx"
    ir.save(onnx_model(traced.module, traced.inputs, traced.outputs), path)
    rng = np.random.default_rng(0)
    arrays = [np.abs(rng.normal(size=t.shape)).astype(np.float32) for t in traced.inputs.values()]
    names = list(traced.inputs), traced.outputs
    want = OnnxProgram(path, *names)(*(array.copy() for array in arrays))
    kept = [array.copy() for array in arrays]
    found = OnnxUpdate(path, *names)(*arrays)
    count = len(opened.manifest.names("lora"))
    new = [*arrays[2 : 2 + count], *arrays[2 + 2 * count :]]
    for have, place, value in zip(found, new, want, strict=True):
        assert have is place
        assert np.array_equal(have, value)
    others = [*range(2), *range(2 + count, 2 + 2 * count)]
    assert all(np.array_equal(arrays[i], kept[i]) for i in others)
    pairs = list(zip(arrays, kept, strict=True))[2 + 2 * count :]
    assert not any(np.array_equal(now, before) for now, before in pairs)


def test_sampler_equals_interpolate(bundle):
    bundles.assert_samples_like_interpolate(bundle[0] / "onnx" / "patch_sampler.onnx")


def test_trains_without_torch(bundle):
    folder, _, batch, opened = bundle
    bundles.assert_trains_without_torch(open_session(opened, "onnx"), folder, "onnx", batch)


def test_another_draw_changes_nothing_kept(bundle):
    """Backward alone leaves adapter and optimiser state as they are."""
    _, _, batch, opened = bundle
    session = open_session(opened, "onnx")
    before = session.state_dict()
    session.backward(bundles.draws(batch, 1)[0])
    for name, value in session.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_foreign_adapter_is_refused(bundle):
    _, _, _, opened = bundle
    session = open_session(opened, "onnx")
    adapter = session.adapter()
    name, value = adapter.popitem()
    with pytest.raises(BadInput, match=name):
        session.load_adapter(adapter)
    with pytest.raises(BadInput, match="shape"):
        session.load_adapter({**adapter, name: value[:1, :1]})


def test_names_the_extra_that_is_missing(bundle, monkeypatch):
    _, _, _, opened = bundle
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInput, match=r"edge-dit\[ort\]"):
        open_session(opened, "onnx")


@pytest.mark.slow
def test_exports_are_reproducible(bundle, tmp_path):
    folder, *_ = bundle
    bundles.write(tmp_path / "again", "onnx")
    for path in sorted((folder / "onnx").iterdir()):
        again = tmp_path / "again" / "onnx" / path.name
        assert path.read_bytes() == again.read_bytes(), path.name
