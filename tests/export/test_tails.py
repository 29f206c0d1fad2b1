"""Tail blocks that run on the device: every layout trains like torch."""

import pytest
import torch

import bundles
import tiny
from edge_dit.app.verify import verify
from edge_dit.contract.bank import Bank
from edge_dit.contract.names import FRESH, THROUGH
from edge_dit.contract.targets import FROZEN, StreamedFacts, block_file
from edge_dit.errors import BadInput
from edge_dit.models.quantize import round_frozen
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import model_of
from edge_dit.reference.evidence import examine
from edge_dit.reference.precompute import precompute
from edge_dit_export.export import export
from edge_dit_export.graph.train_step import run, trace_train_step
from edge_dit_runtime.session import open_session
from edge_dit_runtime.training import train
from variants import VARIANTS

FAMILIES = ("sana-1.5", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image")
"""One variant of each family."""
MARKS = dict.fromkeys(FAMILIES, ())
CASES = [
    # FLUX's tail then has blocks of both kinds.
    pytest.param(("flux-dev", "start"), id="flux-dev-start"),
    *(
        pytest.param(
            (name, "across"), id=name, marks=() if name in FAMILIES else pytest.mark.matrix
        )
        for name in VARIANTS
    ),
]
"""Variants, and where their trained blocks lie."""
TAILS = pytest.mark.parametrize("tail", [FRESH, THROUGH])


@TAILS
@pytest.mark.parametrize("case", CASES)
def test_streamed_gradients_are_eagers(case, tail, tmp_path):
    sub, batch = bundles.made_variant(*case, tail=tail)
    assert "tail_residual" not in batch
    facts = bundles.streamed(tmp_path, (sub, batch), "float32")
    found = bundles.streamed_gradients(tmp_path, (sub, batch), facts)
    tiny.assert_close(tiny.eager(sub, batch), found, 1e-5)


@TAILS
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_the_tails_weights_are_rounded_like_the_others(dtype, tail, tmp_path):
    sub, batch = bundles.made_variant("sana-1.5", "start", tail=tail)
    facts = bundles.streamed(tmp_path, (sub, batch), dtype)
    exact = tiny.eager(sub, batch)
    for name in sub.after:
        round_frozen(sub.get_submodule(name), dtype)
    assert not torch.equal(tiny.eager(sub, batch)["loss"], exact["loss"])
    round_frozen(sub, dtype)
    found = bundles.streamed_gradients(tmp_path, (sub, batch), facts)
    tiny.assert_close(tiny.eager(sub, batch), found, 1e-5)


@TAILS
@pytest.mark.parametrize("recompute", [False, True], ids=["fused", "recompute"])
@pytest.mark.parametrize("variant", ["sana-1.5", "flux-dev"])
def test_traced_steps_equal_autograd(variant, recompute, tail):
    sub, batch = bundles.made_variant(variant, "across", tail=tail)
    step = trace_train_step(sub, batch, recompute)
    tiny.assert_close(tiny.eager(sub, batch), run(step, step.inputs), 1e-5)


@TAILS
def test_a_tails_blocks_have_no_lora_and_a_fresh_one_no_backward_graph(tail, tmp_path):
    sub, batch = bundles.made_variant("sana-1.5", "across", tail=tail)
    facts = StreamedFacts(**bundles.streamed(tmp_path, (sub, batch), "float32"))
    blocks = facts.forward_only if tail == FRESH else facts.blocks[2:]
    assert [block.name for block in blocks] == sub.after == ["transformer_blocks.3"]
    (last,) = blocks
    assert last.lora == {}
    assert last.kind != facts.blocks[0].kind
    backward = block_file(last.kind, "backward")
    assert (backward in facts.graphs) == (tmp_path / "onnx" / backward).exists()
    assert (backward in facts.graphs) == (tail == THROUGH)
    assert f'"{last.name}.'.encode() in (tmp_path / "onnx" / FROZEN).read_bytes()
    assert "tail_residual" not in facts.graphs["head.onnx"].inputs


@pytest.fixture(scope="module", params=[FRESH, THROUGH])
def tailed_road(request, workplace, tmp_path_factory):
    """The small pipeline's road with a tail that runs, the streamed layout in int8."""
    folder = tmp_path_factory.mktemp("tailed")
    for name in ("model", "images"):
        (folder / name).symlink_to(workplace / name)
    text = tiny.JOB.replace("[plan]\n", f'[plan]\ntail = "{request.param}"\n')
    targets = 'targets = ["onnx"]\nweights = "int8"'
    text = text.replace('targets = ["onnx", "ort-training", "executorch"]', targets)
    (folder / "job.toml").write_text(text)
    job = read_job(folder / "job.toml")
    plan = make_plan(job)
    images = read_folder(job.data.images, job.data.prompt, plan.s_max)
    precompute(plan, images, folder / "bank")
    return folder, plan, images, export(plan, folder / "bundle", plan.targets)


def test_a_bundle_with_a_tail_is_certified_and_trains(tailed_road, tmp_path):
    folder, plan, _, bundle = tailed_road
    assert plan.running == [1, 2, 3]
    certificate = verify(bundle.folder, folder / "bank", steps=5)
    assert certificate.passed, certificate.targets
    run = train(bundle.folder, folder / "bank", tmp_path / "run", steps=3)
    assert (run.done, run.layout) == (3, "streamed")


def test_the_bank_of_such_a_tail_holds_no_residual_and_is_examined(tailed_road):
    folder, plan, images, _ = tailed_road
    bank = Bank(folder / "bank", plan.identity())
    assert "tail_residual" not in bank[0]
    for pictures in ([], images):
        result = examine(plan, model_of(plan), bank, pictures)
        assert all(row.passed for row in result.tensors)
        assert not result.false_claims
        assert any(row.name == "bank.draw 0.entry" for row in result.tensors)


def test_ort_training_refuses_a_fresh_tail(workplace, tmp_path):
    (tmp_path / "model").symlink_to(workplace / "model")
    (tmp_path / "images").symlink_to(workplace / "images")
    path = tmp_path / "job.toml"
    path.write_text(tiny.JOB.replace("[plan]\n", '[plan]\ntail = "fresh"\n'))
    with pytest.raises(BadInput, match="ort-training"):
        make_plan(read_job(path))
    path.write_text(path.read_text().replace("tail_skip = 1", "tail_skip = 0"))
    plan = make_plan(read_job(path))  # nothing of a tail is left to run
    assert plan.tail == "stored"
    with pytest.raises(BadInput, match="ort-training"):
        export(
            plan.model_copy(update={"tail": "fresh"}), tmp_path / "bundle", ["onnx", "ort-training"]
        )


def test_ort_training_trains_through_a_tail(tmp_path):
    made = bundles.made_variant("sana-1.5", "across", tail=THROUGH)
    *_, batch, bundle = bundles.write(tmp_path, "ort-training", made=made)
    sub, _ = bundles.made_variant("sana-1.5", "across", tail=THROUGH)
    bundles.assert_trains_like_torch(open_session(bundle, "ort-training"), sub, batch)


@TAILS
def test_executorch_trains_with_a_tail(tail, tmp_path):
    found = bundles.run_executorch_child(tmp_path, "pixart-sigma", "across", "own", tail)
    for check in bundles.executorch_checks("FAMILY_CHECKS"):
        bundles.assert_passed(found, check)
