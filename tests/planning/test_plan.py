"""Plans: the split, its bounds, and what makes two plans the same."""

import json
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.app.describe import plan_in_words
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.families import family_of
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of, read_plan
from edge_dit.planning.split import SplitRequest
from tiny import JOB, write_job


def test_plan_from_a_job(workplace):
    plan = make_plan(read_job(workplace / "job.toml"))
    assert (plan.layers, plan.head_skip, plan.tail_skip) == (4, 1, 1)
    assert (plan.s_min, plan.s_max, plan.multiple) == (32, 64, 8)
    assert plan.grid == (4, 4)


def test_options_override_the_job(workplace):
    job = read_job(workplace / "job.toml")
    assert make_plan(job, SplitRequest(skip_ratio=0.75)).trained == [2]
    assert make_plan(job, SplitRequest(head_skip=0, tail_skip=0)).trained == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("export", "words"),
    [
        ('compute = "int8"', """weights = 'float32'"""),
        ('compute = "int8"\nweights = "float16"', """weights = 'float16'"""),
        ('compute = "int8"\nweights = "int8"\ntargets = ["ort-training"]', "onnx or executorch"),
    ],
)
def test_int8_products_need_int8_weights_and_a_target_that_has_them(workplace, export, words):
    targets = 'targets = ["onnx", "ort-training", "executorch"]'
    kept = "" if "targets" in export else f"\n{targets}"
    path = write_job(workplace, (targets, export + kept))
    with pytest.raises(BadInput, match=words) as caught:
        make_plan(read_job(path))
    assert "export.compute" in str(caught.value)


def test_int8_products_are_no_part_of_what_a_bank_is_for(workplace):
    path = write_job(workplace, ("[export]", '[export]\nweights = "int8"\ncompute = "int8"'))
    plan, other = make_plan(read_job(path)), make_plan(read_job(workplace / "job.toml"))
    assert (plan.compute, other.compute) == ("int8", "float32")
    assert plan.identity() == other.identity()


def test_runs_between_trained_blocks(workplace):
    inner = "inner_skips = [[1, 3]]"
    path = write_job(workplace, ("head_skip = 1", "head_skip = 0"), ("tail_skip = 1", inner))
    plan = make_plan(read_job(path), SplitRequest())
    assert plan.trained == [0, 3]
    assert plan_in_words(plan)[1].startswith("  train blocks 0, 3;")
    assert plan.identity() != plan.model_copy(update={"inner_skips": []}).identity()


@pytest.mark.parametrize("runs", ["[[0, 1]]", "[[2, 2]]", "[[1, 4]]", "[[1, 2], [2, 3]]"])
def test_runs_must_lie_between_trained_blocks(workplace, runs):
    inner = f"inner_skips = {runs}"
    path = write_job(workplace, ("head_skip = 1", "head_skip = 0"), ("tail_skip = 1", inner))
    with pytest.raises(BadInput, match="inner_skips"):
        make_plan(read_job(path))


def test_too_long_a_prompt_is_refused(workplace):
    path = write_job(workplace, ('prompt = "a sks toy"', f'prompt = "{"toy " * 400}"'))
    with pytest.raises(BadInput, match="more would be cut off"):
        make_plan(read_job(path))


def test_no_block_left(workplace):
    path = write_job(workplace, ("head_skip = 1", "head_skip = 3"))
    with pytest.raises(BadInput, match="leave no block to train"):
        make_plan(read_job(path))


def test_sizes_must_be_multiples_and_faults_come_together(workplace):
    path = write_job(
        workplace,
        ("patch = 32", "patch = 30"),
        ("= 64", "= 65"),
        ("tail_skip = 1", "tail_skip = 9"),
    )
    with pytest.raises(ManyFaults) as caught:
        make_plan(read_job(path))
    for fault in (r"(?s)train.patch: 30.*24 or 32", "resolution: 65", "no block"):
        assert re.search(fault, str(caught.value))


def test_a_folder_that_is_not_sana(workplace, tmp_path):
    shutil.copytree(workplace / "images", tmp_path / "images")
    (tmp_path / "model").mkdir()
    path = write_job(tmp_path)
    with pytest.raises(BadInput, match=r"(?s)no model_index.*SanaPipeline"):
        make_plan(read_job(path))
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(BadInput, match=r"(?s)StableDiffusionPipeline.*SanaPipeline"):
        make_plan(read_job(path))
    index.write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(BadInput, match=r"transformer.config\.json"):
        make_plan(read_job(path))


def test_identity_ignores_what_a_bank_does_not_depend_on(workplace):
    plan = make_plan(read_job(workplace / "job.toml"))

    def changed(**update: object) -> str:
        return plan.model_copy(update=update).identity()

    assert plan.identity() == changed(steps=999, targets=["onnx"], rank=2, alpha=1.0)
    for update in ({"head_skip": 0}, {"seed": 4}, {"s_min": 64}, {"model_hash": "x"}):
        assert plan.identity() != changed(**update)


def test_changed_weights_are_noticed(workplace, tmp_path):
    plan = make_plan(read_job(workplace / "job.toml"))
    copy = tmp_path / "model"
    shutil.copytree(workplace / "model", copy)
    assert model_of(plan.model_copy(update={"model": copy})).folder == copy
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadInput, match="other weights"):
        model_of(plan.model_copy(update={"model": copy}))


def test_plan_file_round_trip_and_refusals(workplace, tmp_path):
    plan = make_plan(read_job(workplace / "job.toml"))
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    assert read_plan(path) == plan.model_copy(update={"model": None})
    assert str(workplace) not in path.read_text()
    path.write_text(json.dumps({**json.loads(plan.model_dump_json()), "schema_version": 99}))
    with pytest.raises(BadInput, match="upgrade edge-dit"):
        read_plan(path)
    with pytest.raises(BadInput, match="no such file"):
        read_plan(tmp_path / "nowhere.json")


@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_no_plan_and_no_manifest(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("plan")
    for name, read in (
        ("plan.json", read_plan),
        ("manifest.json", lambda p: open_bundle(folder)),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(BadInput):
            read(folder / name)


def test_plan_type_is_strict():
    with pytest.raises(ValueError, match="extra"):
        Plan.model_validate({"surprise": 1})


def test_lora_targets_that_do_not_exist_are_named_with_near_misses(workplace):
    path = write_job(workplace, ('"ff.conv_point"', '"ff.conv_pont", "ff.conv_depth"'))
    with pytest.raises(ManyFaults) as caught:
        make_plan(read_job(path))
    assert re.search(r"(?s)ff.conv_pont.*did you mean ff.conv_point", str(caught.value))
    assert "ff.conv_depth" in str(caught.value)  # depthwise: no LoRA on it


def test_lora_targets_default_to_the_familys(workplace):
    text = JOB.replace("lora_targets", "# lora_targets")
    (workplace / "plain.toml").write_text(text)
    plan = make_plan(read_job(workplace / "plain.toml"))
    assert plan.lora_targets == list(family_of("sana").lora_targets)
