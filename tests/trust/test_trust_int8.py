"""Bundles that multiply in int8: certified, trained, and their faults found."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planting import relist

from edge_dit.app.verify import verify
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput
from edge_dit.planning.plan import Plan
from edge_dit_export.export import export
from edge_dit_runtime.session import open_session
from edge_dit_runtime.sessions.int8 import PROBE, products_are_exact
from edge_dit_runtime.sessions.ort import onnxruntime
from edge_dit_runtime.training import train
from worlds import make_world

PIPELINES = ("sana-1.5", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image")
STEPS = 6


@pytest.fixture(scope="session")
def int8_world(tmp_path_factory):
    """Makes the world of a pipeline with an int8 bundle, once."""
    made = {}

    worlds = {}

    def of(name, compute="int8"):
        if (name, compute) not in made:
            if name not in worlds:
                worlds[name] = make_world(tmp_path_factory.mktemp(name), name, ("onnx",))
            world = worlds[name]
            choices = {"weights": "int8", "compute": compute, "recompute": True}
            plan = Plan.model_validate(world.plan.model_copy(update=choices))
            folder = world.bank.parent / compute
            made[name, compute] = replace(world, plan=plan, bundle=folder)
            export(plan, folder, ["onnx"])
        return made[name, compute]

    return of


@pytest.mark.parametrize(
    "name",
    [
        *PIPELINES[:2],
        *(pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES[2:]),
    ],
)
def test_every_layout_is_certified(int8_world, name):
    world = int8_world(name)
    bundle = open_bundle(world.bundle)
    assert bundle.layouts("onnx") == ["fused", "recompute", "streamed"]
    certificate = verify(world.bundle, world.bank, steps=STEPS, model=world.plan.model)
    assert certificate.passed, {t: r.in_words() for t, r in certificate.targets.items() if r.failed}
    assert len(certificate.targets) == 6
    drift = certificate.drift["onnx"]
    assert 0.9 < drift.cosine_worst <= drift.cosine_median < 1 - 1e-6
    assert abs(drift.loss_int8 / drift.loss - 1) < 0.1


@pytest.mark.parametrize(
    "name",
    ["sana-1.5", *(pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES[1:])],
)
def test_rotated_products_are_certified(int8_world, name):
    world = int8_world(name, "int8-rotated")
    certificate = verify(world.bundle, world.bank, steps=STEPS, model=world.plan.model)
    assert certificate.passed, {t: r.in_words() for t, r in certificate.targets.items() if r.failed}
    assert len(certificate.targets) == 6
    plain, rotated = (
        open_bundle(int8_world(name, compute).bundle).folder / "onnx" / "frozen.safetensors"
        for compute in ("int8", "int8-rotated")
    )
    assert plain.stat().st_size == rotated.stat().st_size
    assert plain.read_bytes() != rotated.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["int8", "int8-rotated"])
def test_executorch_is_certified(int8_world, tmp_path, compute):
    world = int8_world("sana-1.5", compute)
    export(world.plan, tmp_path / "bundle", ["executorch"])
    certificate = verify(tmp_path / "bundle", world.bank, steps=STEPS, model=world.plan.model)
    assert certificate.passed, certificate.targets["executorch"].in_words()
    assert list(certificate.targets) == ["executorch"]
    assert certificate.drift["executorch"].cosine_median > 0.9


def test_all_layouts_and_torch_take_the_same_step(int8_world):
    world = int8_world("flux-dev")
    bundle = open_bundle(world.bundle)
    losses = []
    for layout in bundle.layouts("onnx"):
        session = open_session(bundle, "onnx", layout)
        draw = Bank(world.bank, bundle.manifest.plan_hash)[0]
        losses.append([session.step(draw) for _ in range(3)])
    np.testing.assert_allclose(losses, [losses[0]] * 3, rtol=5e-3)


def test_it_trains_and_goes_on(int8_world, tmp_path):
    world = int8_world("sana-1.5")
    run = train(world.bundle, world.bank, tmp_path / "run", steps=2)
    assert (run.done, run.layout) == (2, "fused")
    assert train(world.bundle, world.bank, tmp_path / "run", steps=4, resume=True).done == 4


def test_the_probe_is_a_product_of_integers():
    assert products_are_exact(onnxruntime("a test"))
    (node,) = ir.from_proto(onnx.load_from_string(PROBE)).graph
    assert node.op_type == "MatMulInteger"


def test_a_processor_that_saturates_is_refused(int8_world, monkeypatch):
    monkeypatch.setattr("edge_dit_runtime.sessions.int8.products_are_exact", lambda _: False)
    with pytest.raises(BadInput, match="AVX2 without VNNI"):
        open_session(open_bundle(int8_world("flux-dev").bundle), "onnx", "streamed")


def planted(world, folder, damage):
    """A copy of the bundle with a damaged train_step.onnx and a manifest that lists it."""
    shutil.copytree(world.bundle, folder)
    path = folder / "onnx" / "train_step.onnx"
    model = ir.load(path)
    damage(model)
    ir.save(model, path)
    relist(folder)
    return folder


def _products(model):
    return [node for node in model.graph if node.op_type == "MatMulInteger"]


def _no_zero_point(model):
    _products(model)[0].resize_inputs(2)


def _a_scale_5_percent_too_large(model):
    product = _products(model)[0]
    (cast,) = [node for node, _ in product.outputs[0].uses()]
    (scaled,) = [node for node, _ in cast.outputs[0].uses()]
    factor = ir.val("factor", const_value=ir.tensor(np.float32(1.05), name="factor"))
    model.graph.register_initializer(factor)
    more = ir.node("Mul", [scaled.inputs[1], factor])
    model.graph.insert_before(scaled, more)
    scaled.replace_input_with(1, more.outputs[0])


def test_a_scale_that_is_a_little_wrong_is_found(int8_world, tmp_path):
    world = int8_world("flux-dev")
    wrong = planted(world, tmp_path / "wrong", _a_scale_5_percent_too_large)
    certificate = verify(wrong, world.bank, steps=STEPS, model=world.plan.model)
    assert not certificate.targets["onnx unrounded"].passed
    assert certificate.targets["onnx (streamed) unrounded"].passed


def test_a_product_without_its_zero_point_is_refused(int8_world, tmp_path):
    world = int8_world("flux-dev")
    wrong = planted(world, tmp_path / "wrong", _no_zero_point)
    with pytest.raises(BadInput, match=r"train_step.onnx"):
        verify(wrong, world.bank, steps=STEPS, model=world.plan.model)
