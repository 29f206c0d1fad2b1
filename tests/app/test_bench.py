"""bench removes nothing that is not its own, and says what it does not know."""

import pytest

from edge_dit.app.bench import MARKER, Case, bench, in_words, random_model
from edge_dit.contract.targets import VARIANTS, variant_of
from edge_dit.errors import BadInput

SMALL = Case("sana-0.6b", [1], 4, 4, rank=2)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="another --work"):
        random_model(SMALL, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_case_replaces_the_model_and_the_same_case_keeps_it(tmp_path):
    work = tmp_path / "bench"
    random_model(SMALL, work)
    (work / "draw.safetensors").write_bytes(b"of this case")
    random_model(SMALL, work)
    assert (work / "draw.safetensors").is_file()
    random_model(Case("sana-0.6b", [1], 9, 4, rank=2), work)
    assert not (work / "draw.safetensors").exists()
    assert (work / MARKER).is_file()


def test_executions_by_name():
    assert [variant_of(str(execution)) for execution in VARIANTS] == list(VARIANTS)


@pytest.mark.parametrize(
    "name", ["", "onnx:int8", "onnx:fused:int8", "executorch:streamed", "a:b:c:d"]
)
def test_an_unknown_execution_is_refused(name):
    with pytest.raises(BadInput, match="onnx:streamed:int8"):
        variant_of(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "trained"), [("sana-0.6b", [2]), ("pixart-sigma-xl", [1]), ("sd3.5-medium", [1])]
)
def test_a_target_is_compared_with_exact_gradients(tmp_path, config, trained):
    case = Case(config, trained, 16, 8, rank=2, steps=1, full_lora=False)
    (row,) = bench(case, [variant_of("onnx:streamed")], tmp_path / "bench", print)["rows"]
    assert 0 < row["max_grad_rel_error"] < 1e-4
    assert 0 < row["eager_grad_rel_error"] < 1e-4
    assert row["ratio_to_eager"] == row["step_ms"] / row["eager_ms"] > 0
    assert min(row["rss_anon_mb"], row["rss_file_mb"], row["export_s"]) > 0
    assert in_words({"rows": [row]})
