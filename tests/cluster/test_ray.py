"""Banks, selections, ablations and jobs on a Ray cluster of two nodes: the files of one machine.

Needs the extra: pip install "edge-dit[ray]".
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_dit.app.many import Asked, run_many
from edge_dit.cli import with_address
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.pictures.dataset import survey

pytest.importorskip("ray")
REPRODUCE = Path(__file__).resolve().parents[2] / "samples" / "reproduce" / "run.py"


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        (["run", "a.toml", "--ray"], ["run", "a.toml", "--ray=local"]),
        (["run", "--ray", "a.toml", "b.toml"], ["run", "--ray=local", "a.toml", "b.toml"]),
        (["run", "--ray", "auto", "a.toml"], ["run", "--ray", "auto", "a.toml"]),
        (["run", "--ray", "head-1.lab:6379"], ["run", "--ray", "head-1.lab:6379"]),
        (["run", "--ray=ray://head:10001"], ["run", "--ray=ray://head:10001"]),
    ],
)
def test_the_address_of_a_cluster_may_be_left_out(given, filled):
    assert with_address(given) == filled


def test_errors_are_the_same_in_another_process():
    one = BadInput("bank", found="damaged", expected="whole", remedy="again")
    many = ManyFaults("job", [one, BadInput("plan", found="none")])
    for error in (one, many):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back)) == (type(error), str(error))


def test_jobs_of_one_name_are_refused(workplace, tmp_path):
    jobs = [workplace / "job.toml", tmp_path / "job.toml"]
    roads = [Asked(job, tmp_path / "out", None, False) for job in jobs]
    with pytest.raises(BadInput, match="two files of the same name"):
        run_many(roads, print)


# ---------------------------------------------------------------- a cluster


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two nodes with one processor each."""
    from ray.cluster_utils import Cluster

    # Ray's workers are at niceness 15 otherwise: on a busy machine they would hardly run.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    patient = {"health_check_timeout_ms": 60_000, "health_check_initial_delay_ms": 60_000}
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(True, head_node_args={**node, "_system_config": patient})
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()


def command(*arguments: object, script: Path | None = None, cache: Path) -> subprocess.Popen:
    """Start a command with one thread, as the cluster's tasks have."""
    program = [script] if script else ["-c", "from edge_dit.cli import main; main()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, *map(str, [*program, *arguments])],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name[0] != "."
    }


@pytest.fixture(scope="module")
def place(workplace: Path, tmp_path_factory) -> Path:
    """A folder with a plan of several shards, and the bank of one machine."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("model", "images"):
        shutil.copytree(workplace / name, folder / name)
    text = (workplace / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace("draws = 10", "draws = 320"))
    assert "draws = 320" in (folder / "job.toml").read_text()
    finish(command("plan", folder / "job.toml", "-o", folder / "plan.json", cache=folder / "c"))
    finish(precompute(folder, folder / "bank"))
    assert len(list((folder / "bank").glob("shard-*"))) == 5
    return folder


def precompute(place: Path, bank: Path, *more: object) -> subprocess.Popen:
    asked = [place / "job.toml", "--plan", place / "plan.json", "-o", bank, *more]
    return command("precompute", *asked, cache=place / "c")


def workers() -> list[int]:
    """Processes of the cluster that run a task now."""
    import psutil

    return [p.pid for p in psutil.process_iter(["name"]) if p.info["name"].startswith("ray::_do")]


def shards(bank: Path) -> int:
    return len(list(bank.glob("shard-*")))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_bank_has_the_bytes_of_one_machine_though_workers_are_killed(place, address, tmp_path):
    bank, killed, seen = tmp_path / "bank", 0, -1
    driver = precompute(place, bank, "--ray", address)
    while driver.poll() is None:
        if killed < 3 and shards(bank) > seen and (busy := workers()):
            seen = shards(bank)
            os.kill(busy[0], signal.SIGKILL)
            killed += 1
        time.sleep(0.1)
    finish(driver)
    assert killed == 3
    assert contents(bank) == contents(place / "bank")


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_bank_whose_driver_was_killed_is_finished_to_the_same_bytes(place, address, tmp_path):
    bank = tmp_path / "bank"
    driver = precompute(place, bank, "--ray", address)
    while driver.poll() is None and shards(bank) < 2:
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    assert 0 < shards(bank) < 5, "it was killed on the way"
    finish(precompute(place, bank, "--ray", address))
    assert contents(bank) == contents(place / "bank")


def numbers(cache: Path) -> list[dict]:
    """Selections and measurements in a cache, without the seconds that they took."""
    found = []
    for path in sorted((cache / "edge-dit").rglob("*.json")):
        raw = json.loads(path.read_text())
        if "numbers" in raw or "head" in raw:
            found.append({k: v for k, v in raw.items() if k not in ("seconds", "sha256")})
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("method", ["loss", "generation"])
def test_a_selection_has_the_numbers_of_one_machine(place, address, tmp_path, method):
    """And the bytes of the adapters that it tuned; only the seconds differ."""
    found = {}
    for name, more in {"alone": [], "cluster": ["--ray", address]}.items():
        cache = tmp_path / name
        finish(command("select", place / "job.toml", "--method", method, *more, cache=cache))
        tuned = [path.read_bytes() for path in sorted(cache.rglob("tuned-*.safetensors"))]
        assert len(tuned) == 1
        found[name] = (numbers(cache), tuned)
    assert len(found["alone"][0]) > 1
    assert found["cluster"] == found["alone"]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_an_ablation_has_the_files_of_one_machine(address, tmp_path):
    arms = ["--only", "full", "skip-50", "--subjects", 2, "--seeds", 1, "--steps", 3]
    for name, more in {"alone": ["--jobs", 1], "cluster": ["--ray", address]}.items():
        work = tmp_path / name
        finish(command("--work", work, *arms, *more, script=REPRODUCE, cache=tmp_path / "c"))
    runs = [
        {name: without_seconds(name, data) for name, data in contents(folder).items()}
        for folder in (tmp_path / where / "tiny-sana" / "runs" for where in ("alone", "cluster"))
    ]
    assert len(runs[0]) == 8
    assert runs[0] == runs[1]


def without_seconds(name: str, data: bytes) -> bytes | dict:
    """A run's numbers but for how long it took; other files as they are."""
    if not name.endswith(".json"):
        return data
    numbers = json.loads(data)
    assert numbers.pop("seconds") > 0
    return numbers


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_many_jobs_end_at_the_files_of_one_machine(place, address, tmp_path):
    text = (place / "job.toml").read_text().replace("draws = 320", "draws = 10")
    jobs = [place / "one.toml", place / "two.toml"]
    jobs[0].write_text(text)
    jobs[1].write_text(text.replace("seed = 3", "seed = 4"))
    for name, more in {"alone": [], "cluster": ["--ray", address]}.items():
        asked = ["run", *jobs, "-o", tmp_path / name, "--target", "onnx", *more]
        finish(command(*asked, cache=place / "c"))
    for name in ("one", "two"):
        made = [contents(tmp_path / where / name / "lora") for where in ("alone", "cluster")]
        assert made[0], "an adapter"
        assert made[0] == made[1]
        banks = [contents(tmp_path / where / name / "bank") for where in ("alone", "cluster")]
        assert banks[0] == banks[1]


SURVEY = """
import sys
from functools import partial
from pathlib import Path
from edge_dit.cluster.pool import connected
from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import survey

with connected(sys.argv[1], threads=1) as pool:
    try:
        list(pool.map(partial(Path, sys.argv[2]), survey, [False]))
    except BadInput as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_what_a_task_refuses_is_refused_here_in_the_same_words(address, tmp_path):
    with pytest.raises(BadInput) as caught:
        survey(tmp_path)
    asked = [sys.executable, "-c", SURVEY, address, tmp_path]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(caught.value)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_no_cluster_at_an_address_is_one_message(place, tmp_path):
    driver = precompute(place, tmp_path / "bank", "--ray", "127.0.0.1:1")
    _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 2, errors
    assert "edge-dit: --ray: no cluster at 127.0.0.1:1" in errors
