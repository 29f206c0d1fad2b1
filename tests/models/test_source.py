"""Where a model comes from: folders, a hub that the test starts, its cache in every form."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import original
from edge_dit.errors import BadInput
from edge_dit.models.health import model_faults
from edge_dit.models.model import open_model
from edge_dit.models.source import Located, locate, settle
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan, plan_of
from edge_dit.planning.plan import read_plan, write_plan
from hub_server import TOKEN, Hub
from tiny import JOB

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
SANA = SAMPLES / "tiny-sana"
NAME = "org/tiny-sana"
LOADED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
"""The files of tiny-sana that diffusers loads."""


def halved(source: Path, target: Path) -> None:
    """A weight file in float16."""
    save_file({k: v.half() for k, v in load_file(source).items()}, target, {"format": "pt"})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sana in float32 and float16, amid what repositories hold besides."""
    folder = tmp_path_factory.mktemp("repository") / "tiny"
    shutil.copytree(SANA, folder)
    for part in ("transformer", "vae", "text_encoder"):
        for weights in sorted((folder / part).glob("*.safetensors")):
            halved(weights, weights.with_suffix(".fp16.safetensors"))
            weights.with_suffix(".bin").write_bytes(b"pickle")
    (folder / "transformer" / "model.onnx").write_bytes(b"onnx")
    (folder / "vae" / "diffusion_flax_model.msgpack").write_bytes(b"flax")
    (folder / "safety_checker").mkdir()
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "safety_checker")
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "tiny.safetensors")
    for name in ("README.md", "grid.png", "LICENSE"):
        (folder / name).write_bytes(b"text")
    return folder


@pytest.fixture
def hub(hub: Hub, repository: Path) -> Hub:
    """The running hub, with tiny-sana."""
    hub.add(NAME, repository)
    return hub


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def refused(*args, **keys) -> str:
    with pytest.raises(BadInput) as caught:
        locate(*args, **keys)
    assert caught.value.remedy
    return str(caught.value)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# ---------------------------------------------------------------- the hub


def test_a_hub_id_brings_what_is_loaded_and_no_more(hub):
    found = locate(NAME)
    commit = hub.repos[NAME].refs["main"]
    assert (found.name, found.revision, found.folder.name) == (NAME, commit, commit)
    assert files_of(found.folder) == LOADED
    assert open_model(found.folder).hash == open_model(SANA).hash


def test_a_variant_brings_its_weights_only(hub):
    found = locate(NAME, variant="fp16")
    fp16 = {name.replace(".safetensors", ".fp16.safetensors") for name in LOADED}
    assert files_of(found.folder) == fp16


def test_a_part_without_the_variant_comes_as_it_is(hub, repository, tmp_path):
    shutil.copytree(repository, tmp_path / "mixed")
    (tmp_path / "mixed" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    hub.add("org/mixed", tmp_path / "mixed")
    files = files_of(locate("org/mixed", variant="fp16").folder)
    assert "vae/diffusion_pytorch_model.safetensors" in files
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in files
    assert len(files) == len(LOADED)


def test_an_unknown_variant_names_those_there_are(hub):
    message = refused(NAME, variant="bf16")
    assert "model.variant" in message
    assert "one of fp16" in message


def test_revisions_are_branches_tags_and_commits(hub, repository, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(SANA, older)
    (older / "scheduler" / "scheduler_config.json").write_text(
        (SANA / "scheduler" / "scheduler_config.json").read_text() + "\n"
    )
    commit = "b" * 40
    repo = hub.repos[NAME]
    repo.commits[commit] = older
    repo.refs |= {"v0": commit, "refs/pr/1": commit}
    for revision in ("v0", "refs/pr/1", commit):
        assert locate(NAME, revision).revision == commit
    assert locate(NAME).revision == repo.refs["main"]
    assert "model.revision" in refused(NAME, "v9")


def test_offline_the_cache_answers_and_nothing_else_does(hub, monkeypatch):
    online = locate(NAME)
    offline(monkeypatch)
    asked = hub.served.total()
    assert locate(NAME) == online
    assert locate(NAME, online.revision) == online
    assert hub.served.total() == asked
    for message in (refused("org/other"), refused(NAME, "v0"), refused(NAME, variant="fp16")):
        assert "HF_HUB_OFFLINE is set" in message
        assert "hub's cache" in message


def test_a_hub_that_is_gone_leaves_the_cache(hub):
    online = locate(NAME)
    hub.stop()
    assert locate(NAME) == online
    assert hub.url in refused("org/other")


def test_gated_private_and_unknown_models(hub, repository, monkeypatch):
    hub.add("org/gated", repository, gated=True)
    hub.add("org/private", repository, private=True)
    message = refused("org/gated")
    assert "accept its licence" in message
    assert "HF_TOKEN" in message
    for name in ("org/private", "org/nothing"):
        message = refused(name)
        assert "no such model" in message
        assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(locate("org/gated").folder) == LOADED
    assert files_of(locate("org/private").folder) == LOADED
    assert "no such model" in refused("org/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused("org/another")
    assert "401" in message
    assert "token" in message
    assert "hf_wrong" not in message


def test_a_hub_out_of_order_says_so(hub):
    hub.status = 503
    message = refused(NAME)
    assert "503" in message
    assert "run the same command again" in message


def test_a_cut_connection_is_resumed_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # it resumes by chunks of 10 MiB
    size = (SANA / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    hub.breaks["diffusion_pytorch_model.safetensors"] = [size // 2]
    found = locate(NAME)
    assert hub.ranges
    assert open_model(found.folder).hash == open_model(SANA).hash


def test_a_hub_that_dies_for_good_and_the_same_command_later(hub):
    locate_until = hub.breaks.setdefault("model.safetensors", [])
    locate_until += [1000] + [0] * 7
    message = refused(NAME)
    assert "failed" in message
    assert "run the same command again" in message
    hub.breaks.clear()
    before = hub.served["transformer/config.json"]
    found = locate(NAME)
    assert open_model(found.folder).hash == open_model(SANA).hash
    assert hub.served["transformer/config.json"] == before <= 1


def test_repositories_that_are_no_pipeline(hub, tmp_path):
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "flux1-x.safetensors").write_bytes(b"x")
    hub.add("org/single", tmp_path / "single")
    message = refused("org/single")
    assert "no model_index.json" in message
    assert "hf download org/single flux1-x.safetensors" in message
    (tmp_path / "empty").mkdir()
    hub.add("org/empty", tmp_path / "empty")
    assert "no model_index.json" in refused("org/empty")


def test_a_pipeline_of_another_family_is_refused_before_its_weights_come(hub, tmp_path):
    shutil.copytree(SANA, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("SanaPipeline", "StableDiffusionPipeline"))
    hub.add("org/other", tmp_path / "other")
    assert "StableDiffusionPipeline" in refused("org/other")
    assert set(hub.served) == {"other/model_index.json"}


def test_pickles_alone_are_refused(hub, tmp_path):
    shutil.copytree(SANA, tmp_path / "old")
    weights = tmp_path / "old" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    hub.add("org/old", tmp_path / "old")
    message = refused("org/old")
    assert "safetensors" in message
    assert ".bin files are not loaded" in message


def test_the_plan_of_a_hub_id_from_the_command_line(hub, workplace, tmp_path):
    """A process of its own, whose environment says what the fixture patches."""
    job = workplace / "hub.toml"
    job.write_text(JOB.replace('path = "model"', f'path = "{NAME}"\nrevision = "main"'))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", "import edge_dit.cli as c; c.main()", "plan", str(job), "-o"]
    run = [*command, str(tmp_path / "plan.json")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = read_plan(tmp_path / "plan.json")
    commit = hub.repos[NAME].refs["main"]
    assert (plan.model_name, plan.model_revision) == (NAME, commit)
    assert str(tmp_path) not in (tmp_path / "plan.json").read_text()
    hub.stop()
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "elsewhere")}
    run = [*command, str(tmp_path / "second.json")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- folders of the hub's cache


def cached(root: Path, commits: dict[str, Path], refs: dict[str, str], links: bool = True) -> Path:
    """A hand-made `models--org--tiny`: blobs, snapshots of links to them (or copies), refs."""
    repo = root / "models--org--tiny"
    (repo / "blobs").mkdir(parents=True)
    for commit, source in commits.items():
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            target = repo / "snapshots" / commit / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not links:
                shutil.copy(file, target)
                continue
            blob = repo / "blobs" / f"{commit}-{file.parent.name}-{file.name}"
            shutil.copy(file, blob)
            target.symlink_to(os.path.relpath(blob, target.parent))
    for ref, commit in refs.items():
        (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return repo


A, B = "a" * 40, "b" * 40


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("form", ["", "snapshots", f"snapshots/{A}"])
def test_every_form_of_a_cache_folder(tmp_path, form, links):
    repo = cached(tmp_path, {A: SANA}, {"main": A}, links)
    found = locate(settle(str(repo / form), tmp_path))
    assert found == Located(repo / "snapshots" / A, "org/tiny", A)
    assert open_model(found.folder).hash == open_model(SANA).hash


def test_refs_and_revisions_choose_among_snapshots(tmp_path):
    repo = cached(tmp_path, {A: SANA, B: SANA}, {"main": B, "refs/pr/1": A, "v0": A})
    assert locate(repo).revision == B
    for revision in ("v0", "refs/pr/1", A):
        assert locate(repo, revision).revision == A
    assert B in refused(repo, "v9")
    assert "no revision" in refused(repo, "../refs/main")
    assert "remove the key" in refused(repo / "snapshots" / A, "main")


def test_snapshots_without_a_ref(tmp_path):
    repo = cached(tmp_path, {A: SANA, B: SANA}, {})
    message = refused(repo)
    assert A in message
    assert B in message
    shutil.rmtree(repo / "snapshots" / B)
    assert locate(repo).revision == A
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(B)
    assert "not there" in refused(repo)
    shutil.rmtree(repo / "refs")
    shutil.rmtree(repo / "snapshots" / A)
    assert "no snapshot" in refused(repo)


def test_half_a_download_is_refused_and_a_leftover_is_not(tmp_path):
    repo = cached(tmp_path, {A: SANA}, {"main": A})
    (repo / "blobs" / "x.0123abcd.incomplete").write_bytes(b"half")
    assert locate(repo).revision == A
    (repo / "snapshots" / A / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused(repo)
    assert "stopped" in message
    assert "vae/*.safetensors" in message


def test_a_cache_copied_without_its_blobs(tmp_path):
    repo = cached(tmp_path, {A: SANA}, {"main": A})
    shutil.rmtree(repo / "blobs")
    assert "cp -rL" in refused(repo)


def test_a_local_dir_download_that_was_stopped(tmp_path):
    shutil.copytree(SANA, tmp_path / "tiny")
    left = tmp_path / "tiny/.cache/huggingface/download/transformer"
    left.mkdir(parents=True)
    (left / "x.incomplete").write_bytes(b"half")
    assert locate(tmp_path / "tiny") == Located(tmp_path / "tiny", "tiny")
    (tmp_path / "tiny/transformer/diffusion_pytorch_model.safetensors").unlink()
    assert "stopped" in refused(tmp_path / "tiny")


def test_a_clone_without_git_lfs(tmp_path):
    shutil.copytree(SANA, tmp_path / "tiny")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    (tmp_path / "tiny/vae/diffusion_pytorch_model.safetensors").write_text(pointer)
    (fault,) = model_faults(locate(tmp_path / "tiny").folder)
    assert "git lfs pull" in fault.remedy


def test_the_whole_cache_and_a_part_of_a_pipeline(tmp_path):
    repo = cached(tmp_path, {A: SANA}, {"main": A})
    assert "models--org--tiny" in refused(tmp_path)
    assert str(repo / "snapshots" / A) in refused(repo / "snapshots" / A / "vae")


# ---------------------------------------------------------------- what a path means


def test_a_folder_beside_the_job_wins_over_a_hub_id(tmp_path, hub):
    assert settle(NAME, tmp_path) == NAME
    shutil.copytree(SANA, tmp_path / NAME)
    assert settle(NAME, tmp_path) == tmp_path / NAME
    assert locate(settle(NAME, tmp_path)).name == "tiny-sana"
    assert not hub.served


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert settle("~/model", Path("/")) == tmp_path / "model"


@pytest.mark.parametrize(
    "text",
    [
        *("nowhere", "./org/name", "../org/name", "/org/name", "org/name/", "org/name/part"),
        *("org//name", "org/na me", "org/na--me", "org/name.git", "-org/name", "C:\\models\\x"),
        *("~nobody-of-this-name/x", "", "org/model.gguf", "org/model.safetensors", "a" * 300),
        *("a/" + "b" * 200, "org/näme", "nul\0byte"),
    ],
)
def test_what_is_neither_there_nor_a_hub_id(tmp_path, text):
    (tmp_path / "job").mkdir()
    with pytest.raises(BadInput) as caught:
        settle(text or "missing", tmp_path / "job")
    assert "hub id" in caught.value.expected


@pytest.mark.parametrize("prefix", ["https://huggingface.co/", "hf.co/", "hf://"])
def test_a_web_address_is_answered_with_its_id(tmp_path, prefix):
    with pytest.raises(BadInput, match='path = "org/name"'):
        settle(f"{prefix}org/name", tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".gguf", ".GGUF", ".txt"])
def test_files_in_other_formats(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"x")
    with pytest.raises(BadInput) as caught:
        settle(f"model{suffix}", tmp_path)
    assert caught.value.remedy


def test_keys_that_mean_nothing(tmp_path):
    assert "model.revision" in refused(SANA, "main")
    assert "model.config" in refused(SANA, config=SANA)


def test_a_job_is_read_without_asking_the_hub(tmp_path, hub):
    (tmp_path / "images").mkdir()
    job = tmp_path / "job.toml"
    keys = f'path = "{NAME}"\nrevision = "v0"\nvariant = "fp16"'
    job.write_text(JOB.replace('path = "model"', keys))
    read = read_job(job).model
    assert (read.path, read.revision, read.variant) == (NAME, "v0", "fp16")
    assert not hub.served
    job.write_text(JOB.replace('path = "model"', 'path = "https://hf.co/org/name"'))
    with pytest.raises(BadInput, match=r"job.toml:3: a web address"):
        read_job(job)


def test_later_stages_take_the_commit_that_was_planned(tmp_path, hub, workplace, repository):
    job_file = workplace / "named.toml"
    job_file.write_text(JOB.replace('path = "model"', f'path = "{NAME}"'))
    job = read_job(job_file)
    plan = make_plan(job)
    commit = hub.repos[NAME].refs["main"]
    assert (plan.model_name, plan.model_revision) == (NAME, commit)
    write_plan(plan, tmp_path / "plan.json")
    hub.repos[NAME].commits["c" * 40] = repository
    hub.repos[NAME].refs["main"] = "c" * 40
    for stop in (lambda: None, hub.stop):
        stop()
        again = plan_of(job, tmp_path / "plan.json")
        assert again.model == plan.model
        assert again.identity() == plan.identity()
    assert make_plan(read_job(workplace / "job.toml")).model_name == "model"


def test_a_plan_of_a_single_file_names_the_file(tmp_path, workplace, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original.write(original.sana(workplace / "model"), workplace / "one.safetensors")
    job_file = workplace / "one.toml"
    keys = 'path = "one.safetensors"\nconfig = "model"'
    job_file.write_text(JOB.replace('path = "model"', keys))
    job = read_job(job_file)
    plan = make_plan(job)
    assert (plan.model_name, plan.model_revision) == ("one.safetensors", None)
    write_plan(plan, tmp_path / "plan.json")
    assert str(workplace) not in (tmp_path / "plan.json").read_text()
    assert plan_of(job, tmp_path / "plan.json").model == plan.model
