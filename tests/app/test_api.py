"""The Python API: lazy, and its examples run in their order, from a job to an adapter."""

import doctest
import os
import shutil
import subprocess
import sys

import pytest

import edge_dit as ed
import edge_dit_runtime as er

EXAMPLES = (
    (ed, "read_job"),
    (ed, "plan"),
    (ed, "read_pictures"),
    (ed, "precompute"),
    (ed, "export"),
    (ed, "verify"),
    (er, "open"),
    (er, "train"),
    (er, "save_lora"),
    (er, "collect"),
    (er, "live"),
    (er, "paint"),
)
"""In the order of the road: each goes on with what those before it made."""


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory):
    """A folder with a job, its pictures and its model, in which the examples run."""
    folder = tmp_path_factory.mktemp("api")
    for name in ("model", "images"):
        os.symlink(workplace / name, folder / name)
    shutil.copy(workplace / "job.toml", folder)
    job = ed.read_job(folder / "job.toml")
    looped = ed.plan(job).model_copy(update={"loop": True})
    ed.export(looped, folder / "loop_bundle", ["onnx"], job=job)
    return folder


def test_every_example_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {"ed": ed, "er": er}
    for package, name in EXAMPLES:
        found = doctest.DocTestFinder(recurse=False).find(getattr(package, name), name, globs=names)
        examples = [test for test in found if test.examples]
        assert examples, f"{name} has no example"
        for test in examples:
            test.globs = names
            failed = doctest.DocTestRunner().run(test, clear_globs=False).failed
            assert not failed, name
            names |= test.globs
    assert (place / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("package", [ed, er])
def test_every_name_is_there(package):
    assert set(package.__all__) == set(package._HOME)
    for name in package.__all__:
        assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        package.fly  # noqa: B018


def test_a_budget_that_is_none_is_bad_input(workplace):
    job = ed.read_job(workplace / "job.toml")
    for words in ({"ram": "lots"}, {"flash": ""}, {"step_time": "5"}):
        with pytest.raises(ed.BadInput, match=next(iter(words))):
            ed.plan(job, **words)


def test_importing_needs_nothing():
    """Neither torch nor onnx, nor what a stage brings; the budget of 0.3 s is for `bench`."""
    code = "import sys, edge_dit, edge_dit_runtime; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "onnx", "onnxruntime", "executorch", "diffusers", "numpy", "pydantic", "rich"}
    assert not heavy & set(done.stdout.split())


def test_a_module_does_not_take_the_place_of_a_function():
    """A submodule becomes an attribute of its package when it is imported."""
    code = (
        "import edge_dit_runtime.training, edge_dit_runtime.session, edge_dit.app.verify\n"
        "import edge_dit as ed, edge_dit_runtime as er\n"
        "print(callable(er.train), callable(er.open), callable(ed.verify), callable(ed.plan))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4


# ---------------------------------------------------------------- the environment


def in_a_child(name: str, **environment: str) -> str:
    """A variable as a child process of one that imported the package finds it."""
    code = (
        "import edge_dit_runtime, subprocess, sys\n"
        f"inner = 'import os; print(os.environ[\"{name}\"])'\n"
        "subprocess.run([sys.executable, '-c', inner], check=True)"
    )
    kept = {k: v for k, v in os.environ.items() if k != name}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, **environment},
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "ours", "users"),
    [("OMP_WAIT_POLICY", "PASSIVE", "ACTIVE"), ("ORT_DISABLE_TELEMETRY", "1", "0")],
)
def test_child_processes_inherit_what_is_set_and_the_users_word_stays(name, ours, users):
    assert in_a_child(name) == ours
    assert in_a_child(name, **{name: users}) == users


@pytest.mark.parametrize("module", ["edge_dit", "edge_dit_runtime", "edge_dit_export.export"])
def test_telemetry_is_off_before_onnxruntime_is_imported(module):
    """It is imported late, in functions; `edge_dit` comes before all other modules of ours."""
    code = (
        f"import os, sys, {module}\n"
        "print('onnxruntime' in sys.modules, os.environ.get('ORT_DISABLE_TELEMETRY'))"
    )
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=kept
    )
    assert done.stdout.split() == ["False", "1"]


@pytest.mark.parametrize(("policy", "spins"), [("PASSIVE", "0"), ("ACTIVE", "1"), ("active", "1")])
def test_waiting_threads_sleep_in_sessions(monkeypatch, policy, spins):
    from edge_dit_runtime.sessions.ort import onnxruntime, session_options

    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    options = session_options(onnxruntime("this test"))
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == spins


def test_every_session_is_opened_with_these_options(road, monkeypatch):
    """Onnxruntime's own sessions say what they were opened with."""
    from edge_dit_runtime.session import open_session

    session = open_session(ed.open_bundle(road.bundle), "onnx")
    for program in (session._train, session._optimizer):
        options = program._session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
