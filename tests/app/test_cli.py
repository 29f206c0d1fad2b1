"""The command line as a user meets it: exit codes, one clear message, nothing half-written."""

import json
import shutil
import sys

import pytest
from PIL import Image

from edge_dit.cli import MOVED
from edge_dit.contract.adapter import read_adapter


def test_the_whole_road(run, road, tmp_path):
    plan, bank, bundle = tmp_path / "plan.json", tmp_path / "bank", tmp_path / "bundle"
    commands = [
        ("plan", road.job, "-o", plan),
        ("precompute", road.job, "--plan", plan, "-o", bank),
        ("export", road.job, "--plan", plan, "-o", bundle, "--target", "onnx"),
        ("verify", bundle, "--bank", bank, "--steps", 2),
        ("train", bundle, "--bank", bank, "-o", tmp_path / "run", "--steps", 3),
        ("adapter", tmp_path / "run", "-o", tmp_path / "lora"),
    ]
    for command in commands:
        code, out, err = run(*command)
        assert code == 0, err
        assert out
    for made in (plan, bank, bundle, tmp_path / "run", tmp_path / "lora"):
        code, out, _ = run("inspect", made, "--json")
        assert code == 0
        assert json.loads(out)
        assert run("inspect", made)[0] == 0


def test_json_is_one_object_on_stdout(run, road, tmp_path):
    code, out, _ = run("plan", road.job, "-o", tmp_path / "p.json", "--json")
    assert code == 0
    assert json.loads(out)["layers"] == 4
    assert json.loads(run("doctor", "--json")[1])["work"]["train onnx"]["ready"]


def test_doctor_gives_the_pip_line_of_a_missing_extra(run, monkeypatch):
    monkeypatch.setattr("edge_dit.app.doctor.is_installed", lambda module: module != "executorch")
    assert 'pip install "edge-dit[executorch]"' in run("doctor")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "nowhere.toml"), "no such file"),
        (("plan", "{job}", "--skip-ratio", "1.5"), "--skip-ratio"),
        (("plan", "{job}", "--head-skip", "9"), "no block to train"),
        (("precompute", "{job}", "--plan", "nowhere.json", "-o", "{new}"), "edge-dit plan"),
        (("precompute", "{job}", "--plan", "{job}", "-o", "{new}"), "unreadable"),
        (("precompute", "{job}", "--plan", "{plan}", "-o", "{bundle}"), "not a bank"),
        (("export", "{job}", "--plan", "{plan}", "-o", "{bank}"), "not something this command"),
        (("export", "{job}", "--plan", "{plan}", "-o", "{new}", "--target", "tpu"), "tpu"),
        (("verify", "{bank}", "--bank", "{bank}"), "no manifest.json"),
        (("verify", "{bundle}", "--bank", "{bundle}"), "no index.json"),
        (("train", "{bundle}", "--bank", "nowhere", "-o", "{new}"), "a bank folder"),
        (("train", "{bundle}", "--bank", "{bank}", "-o", "{new}", "--resume"), "no run to resume"),
        (("adapter", "{bank}", "-o", "{new}"), "no run.json"),
        (("inspect", "nowhere"), "no such file or folder"),
        (("run", "nowhere.toml", "-o", "{new}"), "no such file"),
        (("run", "{job}", "-o", "{bank}"), "not the folder of a run"),
        (("run", "{job}", "-o", "{new}", "--target", "tpu"), "tpu"),
        (("cost", "flux.9"), "flux.1-dev"),
        (("select", "nowhere.toml"), "no such file"),
        (("select", "{job}", "--method", "guess"), "generation or loss"),
        (("quickstart", "--job", "nowhere.toml", "-o", "{new}"), "no such file"),
        (("train", "{bundle}", "--bank", "{bank}", "-o", "{new}", "--target", "onnx:x"), "onnx:x"),
        (("train", "{bundle}"), "Missing"),
        (("fly",), "No such command"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_writes_nothing(
    run, road, tmp_path, arguments, words, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {
        "job": road.job,
        "plan": road.folder / "plan.json",
        "bank": road.bank,
        "bundle": road.bundle,
        "new": tmp_path / "new",
    }
    before = sorted(road.folder.rglob("*"))
    code, out, err = run(*(a.format(**places) for a in arguments))
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not out
    assert list(tmp_path.iterdir()) == []
    assert sorted(road.folder.rglob("*")) == before


def test_an_adapter_in_formats_that_its_family_has_and_has_not(run, road, tmp_path):
    trained, lora = tmp_path / "run", tmp_path / "lo'ra"
    run("train", road.bundle, "--bank", road.bank, "-o", trained, "--target", "onnx", "--steps", 1)
    for form in ("kohya", "comfyui", "a1111", ""):
        code, out, err = run("adapter", trained, "-o", lora, "--format", form)
        assert (code, out) == (2, "")
        assert err.startswith("edge-dit: --format: ")
        assert "expected: one of diffusers, peft" in err
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == [trained]
    kept = read_adapter(trained / "adapter.safetensors")
    for form, options in (("diffusers", ()), ("peft", ("--format", "peft"))):
        code, out, _ = run("adapter", trained, "-o", lora / form, *options, "--json")
        facts = json.loads(out)
        assert (code, facts["format"]) == (0, form)
        assert repr(str(lora / form)) in facts["load"]
        facts = json.loads(run("inspect", lora / form, "--json")[1])
        assert (facts["rank"], facts["alpha"]) == (road.plan.rank, road.plan.alpha) == kept[1:]
        assert facts["format"] == form


@pytest.mark.parametrize(("command", "flag"), MOVED)
def test_a_flag_that_moved_says_where(run, road, command, flag):
    code, out, err = run(command, road.job if command == "plan" else road.bundle, flag, "x")
    assert code == 2
    assert MOVED[command, flag] in err.replace("\n", " ")
    assert not out


def test_bank_of_another_plan(run, road, tmp_path):
    plan = tmp_path / "plan.json"
    run("plan", road.job, "-o", plan, "--head-skip", 2)
    code, _, err = run("precompute", road.job, "--plan", plan, "-o", road.bank)
    assert code == 2
    assert "another plan" in err
    run("precompute", road.job, "--plan", plan, "-o", tmp_path / "bank")
    code, _, err = run("train", road.bundle, "--bank", tmp_path / "bank", "-o", tmp_path / "run")
    assert code == 2
    assert "belongs to another plan" in err
    assert not (tmp_path / "run").exists()


def test_missing_extra_gives_the_pip_line(run, road, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    arguments = (
        "--plan",
        road.folder / "plan.json",
        "-o",
        tmp_path / "b",
        "--target",
        "executorch",
    )
    code, _, err = run("export", road.job, *arguments)
    assert code == 2
    assert 'pip install "edge-dit[executorch]"' in err
    assert not (tmp_path / "b").exists()


def test_a_failed_check_exits_1_and_names_the_tensor(run, road, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(road.bundle, bundle)
    data = bundle / "onnx" / "frozen.safetensors"
    values = bytearray(data.read_bytes())
    start = 8 + int.from_bytes(values[:8], "little") + 3
    values[start::4] = bytes(b ^ 1 for b in values[start::4])  # weights double, halve or so
    data.write_bytes(values)
    code, _, err = run("verify", bundle, "--bank", road.bank, "--steps", 1, "--target", "onnx")
    assert code == 1
    assert "parity failed" in err
    assert "tolerance" in err


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("plan", "nowhere.toml", "--debug")[2]


def test_small_images_are_enlarged_with_a_warning(run, road, tmp_path):
    from PIL import Image

    job = tmp_path / "job.toml"
    job.write_text(road.job.read_text().replace('"model"', f'"{road.folder / "model"}"'))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "images" / "small.png")
    assert run("plan", job, "-o", tmp_path / "plan.json")[0] == 0
    arguments = ("precompute", job, "--plan", tmp_path / "plan.json", "-o", tmp_path / "bank")
    code, _, err = run(*arguments)
    assert code == 0
    assert "small.png is smaller than 64 px and was enlarged" in err


def test_what_is_left_out_is_said_at_plan_and_in_inspect(run, road, tmp_path):
    shutil.copytree(road.folder / "images", tmp_path / "images")
    (tmp_path / "images" / "b.psd").write_text("")
    (tmp_path / "images" / "more").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "more" / "c.png")
    text = road.job.read_text().replace('"model"', json.dumps(str(road.folder / "model")))
    (tmp_path / "job.toml").write_text(text)
    reason = "a sub-folder with 1 picture; [data] recursive = true reads it"
    psd = ".psd is no kind of picture that edge-dit reads: save it as PNG"
    code, out, err = run("plan", str(tmp_path / "job.toml"), "-o", str(tmp_path / "plan.json"))
    assert code == 0, err
    assert f"left out: more: {reason}" in out
    assert "2 without take [data] prompt: " in out
    page = ("plan", str(tmp_path / "job.toml"), "-o", str(tmp_path / "plan.json"), "--json")
    for command in (page, ("inspect", str(tmp_path / "images"), "--json")):
        code, out, err = run(*command)
        facts = json.loads(out)
        facts = facts.get("pictures") if command[0] == "plan" else facts
        assert facts["pictures"] == 3
        assert facts["left_out"] == [
            {"name": "b.psd", "reason": psd},
            {"name": "more", "reason": reason},
        ]
        assert len(facts["without_caption"]) == 2
    code, out, err = run("inspect", str(tmp_path / "images"))
    assert f"left out: more: {reason}" in out
    (tmp_path / "job.toml").write_text(text.replace("[data]", "[data]\nrecursive = true"))
    code, out, err = run("plan", str(tmp_path / "job.toml"), "-o", str(tmp_path / "plan.json"))
    assert "4 pictures" in out
    assert "more" not in out.partition("left out")[2].partition("\n")[0]
