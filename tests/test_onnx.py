import subprocess
import sys
import textwrap

import bundles
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch

from edge_dit_runtime.onnx_session import OnnxSession

FILES = ("train_step", "optimizer", "patch_sampler")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    sub, batch, manifest = bundles.write(folder, "onnx")
    return folder, sub, batch, manifest


def test_trains_like_torch(bundle):
    folder, _, _, manifest = bundle
    sub, batch = tiny.subgraph()
    bundles.assert_trains_like_torch(OnnxSession(folder, manifest), sub, batch)


def test_resumes_bit_for_bit(bundle):
    folder, _, batch, manifest = bundle
    bundles.assert_resumes_bit_for_bit(lambda: OnnxSession(folder, manifest), batch)


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
    folder, sub, batch, manifest = bundle
    lora = list(sub.lora_parameters())
    names = {}
    for name in FILES:
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")
        inputs = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        assert manifest.targets["onnx"]["graphs"][f"{name}.onnx"] == {
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
    stored = (folder / "onnx" / "train_step.onnx.data").stat().st_size
    # The gradient of a depthwise convolution has the kernel turned round, a copy.
    assert stored <= frozen + kernels


def test_optimizer_equals_its_module(bundle):
    folder, sub, _, _ = bundle
    from edge_dit_export.optimizer import AdamWStep

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


def test_sampler_equals_interpolate(bundle):
    from edge_dit.sampler import crop_at

    session = onnxruntime.InferenceSession(bundle[0] / "onnx" / "patch_sampler.onnx")
    sampler = bundles.SAMPLER
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(sampler.s_max, 3 * sampler.s_max, 2)
        image = rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        sigma, u, v = rng.uniform(0, 1, 3).astype(np.float32)
        feeds = {"image": image, "sigma": sigma[None], "uv": np.array([u, v])}
        patch = session.run(None, feeds)[0]
        crop = None
    assert crop_at


TRAIN_WITHOUT_TORCH = """
    import sys
    from pathlib import Path

    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "diffusers"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, NoTorch())
    from safetensors.numpy import load_file, save_file
    from edge_dit.bundle import read_manifest
    from edge_dit_runtime.session import open_session

    bundle, target = Path(sys.argv[1]), sys.argv[2]
    session = open_session(bundle, read_manifest(bundle), target)
    draw = load_file(bundle / "draw.safetensors")
    print(*(session.step(draw) for _ in range(5)))
"""
