"""bench: the tasks of its processes, its numbers as JSON, and the work folder it may empty."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from edge_dit.app.bench import bench as bench_module
from edge_dit.app.bench.bench import (
    BASELINES,
    METRICS,
    Asked,
    Baseline,
    Process,
    Report,
    Row,
    bench,
    in_words,
)
from edge_dit.app.bench.child import (
    TASK,
    ExportTask,
    FullLoraTask,
    ProfileTask,
    ReferenceTask,
    SessionTask,
    TorchTask,
    adapter_file,
    operators,
    read_task,
)
from edge_dit.app.bench.machine import busy_warning, this_machine
from edge_dit.app.bench.model import MARKER, Case, random_model
from edge_dit.cli import main
from edge_dit.contract.targets import INT8_VARIANTS, VARIANTS, TargetVariant, variant_of
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.models.public_configs import public_config

EVERY = VARIANTS + INT8_VARIANTS
SMALL = Case("sana-0.6b", [1], 4, 4, rank=2)
STREAMED = TargetVariant("onnx", "streamed")
ROW = Row(
    target="onnx",
    layout="streamed",
    dtype="int8",
    compute="float32",
    trained_blocks=2,
    step_ms=1500.5,
    eager_ms=1000.0,
    ratio_to_eager=1.5005,
    ratio_to_fastest_torch=2.501,
    full_lora_ms=None,
    ratio_to_full_lora=None,
    rss_anon_mb=60.5,
    rss_file_mb=124.0,
    artifact_bytes=83158151,
    export_s=27.0,
    export_rss_mb=752.0,
    max_grad_rel_error=1.4e-06,
    eager_grad_rel_error=1.0e-06,
    read_mb=0.0,
)
TORCH = Baseline("eager-bf16", 600.0, 660.0, 20.0, 0.02)


# ---------------------------------------------------------------- the work folder


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="another --work"):
        random_model(SMALL, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_case_replaces_the_model_and_the_same_case_keeps_it(tmp_path):
    work = tmp_path / "bench"
    random_model(SMALL, work)
    (work / "draw.safetensors").write_bytes(b"of this case")
    random_model(replace(SMALL, steps=9), work)
    assert (work / "draw.safetensors").is_file()
    random_model(replace(SMALL, tokens=9), work)
    assert not (work / "draw.safetensors").exists()
    assert (work / MARKER).is_file()


def test_bundles_of_other_package_versions_are_not_used_again(tmp_path, monkeypatch):
    work = tmp_path / "bench"
    random_model(SMALL, work)
    (work / "draw.safetensors").write_bytes(b"of these versions")
    monkeypatch.setattr("edge_dit.app.bench.model.package_versions", lambda: {"torch": "9.9"})
    random_model(SMALL, work)
    assert not (work / "draw.safetensors").exists()


def test_variants_by_name():
    assert [variant_of(str(variant)) for variant in EVERY] == list(EVERY)


@pytest.mark.parametrize(
    "name",
    ["", "onnx:int8", "onnx:fused:int8", "executorch:streamed", "onnx:::int8", "a:b:c:d:e"],
)
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(BadInput, match="onnx:streamed:int8"):
        variant_of(name)


# ---------------------------------------------------------------- tasks and processes


@pytest.mark.parametrize(
    "task",
    [
        ReferenceTask(Path("work"), "int8"),
        TorchTask(Path("work"), 5, bf16=True),
        FullLoraTask(SMALL, bf16=True),
        ProfileTask(Path("work"), STREAMED, Path("work/bundle"), 3),
        ExportTask(Path("work"), STREAMED, Path("work/bundle")),
        SessionTask(Path("work"), STREAMED, Path("work/bundle"), 5, Path("gradients")),
    ],
    ids=lambda task: task.kind,
)
def test_a_task_arrives_as_it_was_sent(task):
    assert read_task(TASK.dump_json(task).decode()) == task


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "EOF"),
        ("[]", "task: Input should be an object"),
        ('{"dtype": "int8"}', "'kind'"),
        ('{"kind": "quantum", "work": "w"}', "'quantum'"),
        ('{"kind": "torch", "work": "w"}', "torch.steps: Field required"),
        ('{"kind": "torch", "work": "w", "steps": "x"}', "torch.steps: .*integer"),
        ('{"kind": "reference", "work": "w", "dtype": "int8", "step": 1}', "reference.step: "),
    ],
)
def test_a_bad_task_is_refused_with_its_fault(text, words):
    with pytest.raises(BadInput, match=words):
        read_task(text)


def test_a_process_with_a_bad_task_ends_with_one_line_and_code_2():
    child = subprocess.run(
        [sys.executable, "-m", "edge_dit.app.bench.child"],
        input='{"kind": "quantum"}',
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 2
    assert child.stdout == ""
    (line,) = child.stderr.splitlines()
    assert "'quantum'" in line
    assert "expected: one task as a JSON object" in line


def test_a_fault_in_a_process_reaches_the_user(tmp_path):
    task = SessionTask(tmp_path, STREAMED, tmp_path / "nothing", 1, tmp_path / "gradients")
    with pytest.raises(BadInput, match=r"bench session: .*nothing: no manifest\.json in it"):
        bench_module.run_task(task)


# ---------------------------------------------------------------- numbers


def test_a_report_is_the_same_after_json():
    report = Report(SMALL, this_machine(), [TORCH], [ROW], {"onnx": {"Gemm.ms": 1.5}})
    text = json.dumps(asdict(report))
    assert list(json.loads(text)) == ["case", "machine", "baselines", "rows", "operators"]
    assert TypeAdapter(Report).validate_json(text) == report


def test_the_table_shows_numbers_of_the_row_and_what_was_not_measured():
    assert METRICS.keys() <= {field.name for field in fields(Row)}
    rows = [ROW, replace(ROW, dtype="float32", full_lora_ms=3000.0)]
    no_compiler = Baseline("compile", None, None, None, None, "no compiler")
    operators = {"Gemm.ms": 3.0, "Gemm.calls": 8.0, "Add.ms": 1.0, "Add.calls": 2.0}
    report = Report(SMALL, this_machine(), [TORCH, no_compiler], rows, {"onnx": operators})
    lines = in_words(report)
    assert lines[0].split() == ["onnx:streamed:int8", "onnx:streamed"]
    assert lines[-5:] == [
        "torch, eager-bf16: 600 ms, 660 MB anonymous, 20 MB of files, gradient error 2.0e-02",
        "torch, compile: no compiler",
        "operators of onnx:",
        "  Gemm: 3.0 ms, 75%, 8 calls",
        "  Add: 1.0 ms, 25%, 2 calls",
    ]
    table = {line[:22].strip(): line[22:].split() for line in lines[1:-5]}
    assert table["step, ms"][0] == "1,500"
    assert table["of eager"][0] == "1.500"
    assert table["of full LoRA"] == ["-", "-"]
    assert table["gradient error"][0] == "1.4e-06"


@pytest.mark.parametrize(("load", "warns"), [(None, False), (1.0, False), (1.1, True)])
def test_other_work_on_the_machine_makes_one_warning(load, warns):
    warning = busy_warning(replace(this_machine(), cores=2, load_average=load))
    assert bool(warning) == warns
    assert not warns or ("1.1 on 2 cores" in warning and "\n" not in warning)


def test_this_machine_has_a_name_and_versions():
    machine = this_machine()
    assert machine.processor
    assert machine.versions["torch"]
    assert "onnxruntime" in machine.versions


@pytest.fixture
def in_this_process(monkeypatch):
    """Tasks run here on a model of width 32, which saves starting and importing torch each time."""
    narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2}
    narrow |= {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 24}
    narrow |= {"in_channels": 4, "out_channels": 4, "num_layers": 2}

    def small(name: str):
        public = public_config(name)
        return replace(public, config={**public.config, **narrow}, resolution=128)

    def run(task):
        return Process(read_task(TASK.dump_json(task).decode()).run(), anon_mb=2.0, file_mb=1.0)

    monkeypatch.setattr("edge_dit.app.bench.model.public_config", small)
    monkeypatch.setattr("edge_dit.app.bench.child.public_config", small)
    monkeypatch.setattr(bench_module, "run_task", run)
    return run


def test_the_command_writes_every_number(in_this_process, tmp_path, monkeypatch, capsys):
    work, output = tmp_path / "bench", tmp_path / "results" / "bench.json"
    arguments = ["--trained", "1", "--tokens", "16", "--text", "8", "--rank", "2", "--steps", "1"]
    targets = ["--target", "onnx", "--target", "onnx:streamed:int8:int8"]
    others = ["--baseline", "eager-bf16", "--baseline", "full-lora-bf16", "--profile"]
    command = ["edge-dit", "bench", *arguments, *targets, *others, "--work", work, "-o", output]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    report = TypeAdapter(Report).validate_json(output.read_bytes())
    assert report.case == Case("sana-0.6b", [1], 16, 8, rank=2, steps=1)
    assert [row.layout for row in report.rows] == ["fused", "streamed"]
    table = capsys.readouterr().out.splitlines()
    assert table == in_words(report)
    assert [b.name for b in report.baselines] == ["eager", "eager-bf16", "full-lora-bf16"]
    exact, bf16, full = report.baselines
    assert 0 < exact.grad_rel_error < 1e-4 < bf16.grad_rel_error < 1
    assert full.grad_rel_error is None
    assert [row.compute for row in report.rows] == ["float32", "int8"]
    assert 0 < report.rows[0].max_grad_rel_error < 1e-4 < report.rows[1].max_grad_rel_error < 1
    fused, streamed = report.operators.values()
    assert fused["Gemm.calls"] > 0
    assert {"MatMulIntegerToFloat.calls", "DynamicQuantizeMatMul.calls"} & streamed.keys()
    for row in report.rows:
        assert 0 < row.eager_grad_rel_error < 1e-4
        assert row.ratio_to_eager == row.step_ms / row.eager_ms > 0
        assert row.ratio_to_full_lora == row.step_ms / row.full_lora_ms > 0
        fastest = min(exact.step_ms, bf16.step_ms)
        assert row.ratio_to_fastest_torch == row.step_ms / fastest > 0
        assert row.artifact_bytes > 0
    adapter = load_file(adapter_file(work, "float32"))
    assert all(np.abs(value).max() > 0 for value in adapter.values())


def test_an_unknown_baseline_is_refused_before_any_work(tmp_path):
    with pytest.raises(BadInput, match="--baseline") as caught:
        bench(SMALL, Asked([STREAMED], ["jax"]), tmp_path / "bench", print)
    assert all(name in str(caught.value) for name in BASELINES)
    assert not (tmp_path / "bench").exists()


def test_a_baseline_that_the_case_leaves_out_is_refused(tmp_path):
    case = replace(SMALL, full_lora=False)
    with pytest.raises(BadInput, match="full-lora-bf16 beside --no-full-lora"):
        bench(case, Asked([STREAMED], ["full-lora-bf16"]), tmp_path / "bench", print)
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("option", [["--profile"], ["--baseline", "compile"], ["--memory", "1GiB"]])
def test_what_the_loop_would_not_use_is_refused(monkeypatch, capsys, tmp_path, option):
    command = ["edge-dit", "bench", "--loop", *option, "--work", str(tmp_path / "bench")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--loop: --profile, --baseline or --memory beside it" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


@pytest.mark.slow
def test_a_step_in_little_memory(tmp_path):
    case = replace(SMALL, full_lora=False)
    try:
        report = bench(case, Asked([STREAMED], [], memory=400 * 2**20), tmp_path, print)
    except BadInput as fault:
        pytest.skip(str(fault))
    assert report.rows[0].memory_mb == 400 * 2**20 / 1e6
    assert report.rows[0].rss_anon_mb + report.rows[0].rss_file_mb < 400 * 2**20 / 1e6
    said: list[str] = []
    report = bench(case, Asked([STREAMED], [], memory=40 * 2**20), tmp_path, said.append)
    assert not report.rows
    assert "killed" in said[-1]


def test_torch_that_cannot_compile_says_so_and_the_rest_goes_on(in_this_process, tmp_path):
    def broken(task):
        if isinstance(task, TorchTask) and task.compiled:
            raise CheckFailed("bench torch: no compiler")
        return in_this_process(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "run_task", broken)
        case = replace(SMALL, full_lora=False, steps=1)
        report = bench(case, Asked([]), tmp_path / "bench", print)
    names = ["eager", "eager-bf16", "compile", "compile-bf16"]
    assert [baseline.name for baseline in report.baselines] == names
    assert [b.step_ms is None for b in report.baselines] == [False, False, True, True]
    assert report.baselines[2].note == "bench torch: no compiler"


def test_eager_that_cannot_run_ends_the_bench(in_this_process, tmp_path, monkeypatch):
    """Its milliseconds would else be those of another baseline."""

    def broken(task):
        if isinstance(task, TorchTask) and not task.bf16:
            raise CheckFailed("bench torch: ended with code -9")
        return in_this_process(task)

    monkeypatch.setattr(bench_module, "run_task", broken)
    case = replace(SMALL, full_lora=False, steps=1)
    with pytest.raises(CheckFailed, match="code -9"):
        bench(case, Asked([], ["eager-bf16"]), tmp_path / "bench", print)


def test_operators_are_those_of_the_timed_steps_in_all_sessions(tmp_path):
    def node(ts, name, dur):
        name_of_event = f"{name}_1_kernel_time"
        return {
            "cat": "Node",
            "name": name_of_event,
            "ts": ts,
            "dur": dur,
            "args": {"op_name": name},
        }

    def run(ts):
        return {"cat": "Session", "name": "model_run", "ts": ts, "dur": 99}

    once = [[run(t), node(t + 1, "Gemm", 9000 if t < 20 else 1000)] for t in range(0, 50, 10)]
    twice = [[run(t), node(t + 1, "Gemm", 500), node(t + 2, "Add", 60)] for t in range(0, 100, 10)]
    # A profile lists a run after its nodes.
    for name, runs in (("a", once), ("b", twice)):
        events = [event for events in runs for event in reversed(events)]
        (tmp_path / f"{name}.json").write_text(json.dumps(events))
    (tmp_path / "idle.json").write_text('[{"cat": "Session", "name": "session_initialization"}]')
    found = operators(tmp_path, 3)
    assert found == pytest.approx({"Gemm.calls": 3, "Gemm.ms": 2, "Add.calls": 2, "Add.ms": 0.12})


@pytest.mark.slow
def test_torch_itself_says_in_one_line_that_a_compiler_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    case = Case("sana-0.6b", [1], 16, 8, rank=2, steps=1, full_lora=False)
    report = bench(case, Asked([], ["compile"]), tmp_path / "bench", print)
    eager, compiled = report.baselines
    assert eager.step_ms
    assert compiled.step_ms is None
    assert "compiler" in compiled.note
    assert "\n" not in compiled.note


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "trained"), [("sana-0.6b", [2]), ("pixart-sigma-xl", [1]), ("sd3.5-medium", [1])]
)
def test_a_target_is_compared_with_exact_gradients(tmp_path, config, trained):
    case = Case(config, trained, 16, 8, rank=2, steps=1, full_lora=False)
    report = bench(case, Asked([STREAMED], ["eager"]), tmp_path / "bench", print)
    (row,) = report.rows
    assert 0 < row.max_grad_rel_error < 1e-4
    assert 0 < row.eager_grad_rel_error < 1e-4
    assert row.ratio_to_eager == row.step_ms / row.eager_ms > 0
    assert min(row.rss_anon_mb, row.rss_file_mb, row.export_s) > 0
    assert in_words(report)
