"""Buckets, by fsspec: copies of what is there, uploads of what was made, and uploads that stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from edge_dit.errors import BadInput
from edge_dit.store import remote
from edge_dit.store.remote import copy_of, fetched, mirrored, named, path_from, url_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bucket():
    """A file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def test_paths_and_urls_of_copies():
    place = copy_of("s3://lab/a/bank/")
    assert place.parts[-4:] == ("s3", "lab", "a", "bank")
    assert copy_of("s3:/lab/a/bank") == place, "pathlib makes one slash of two"
    assert url_of(place / "index.json") == "s3://lab/a/bank/index.json"
    assert url_of(Path("bank")) is None
    assert named(f"{place}: damaged") == "s3://lab/a/bank: damaged"
    with pytest.raises(BadInput, match=r"'\.\.' in it"):
        copy_of("s3://lab/../other")


@pytest.mark.parametrize("text", ["C:/data", "images", "org/model", "https://x.org/a", "hf://a/b"])
def test_other_paths_are_left_to_others(text):
    assert not remote.is_url(text)


def test_a_copy_follows_its_folder(bucket):
    bucket.pipe({"memory://lab/images/a.txt": b"one", "memory://lab/images/in/b.txt": b"two"})
    folder = fetched("memory://lab/images")
    before = (folder / "a.txt").stat()
    assert (folder / "in" / "b.txt").read_bytes() == b"two"
    bucket.pipe("memory://lab/images/in/b.txt", b"other")
    bucket.pipe("memory://lab/images/c.txt", b"three")
    assert (fetched("memory://lab/images") / "in" / "b.txt").read_bytes() == b"other"
    assert (folder / "a.txt").stat().st_ino == before.st_ino, "what did not change is kept"
    bucket.rm("memory://lab/images/c.txt")
    fetched("memory://lab/images")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "in"]


def test_what_is_not_there_is_refused(bucket):
    with pytest.raises(BadInput, match="memory://lab/none: not there"):
        fetched("memory://lab/none")


def test_a_path_beside_a_file_of_a_bucket_is_in_that_bucket(bucket, tmp_path):
    bucket.pipe({"memory://lab/job.toml": b"", "memory://lab/images/a.txt": b"one"})
    base = fetched("memory://lab/job.toml").parent
    assert (path_from(base, "images") / "a.txt").read_bytes() == b"one"
    assert (path_from(tmp_path, "memory://lab/images") / "a.txt").is_file()
    assert path_from(base, "nothing") == base / "nothing"


def test_what_a_command_writes_is_uploaded_and_no_more(bucket):
    bucket.pipe("memory://lab/job.toml", b"job")
    created = bucket.info("memory://lab/job.toml")["created"]
    with mirrored(["run", "memory://lab/job.toml", "--out=memory://lab/out"]) as arguments:
        job, out = Path(arguments[1]), Path(arguments[2].removeprefix("--out="))
        assert job.read_bytes() == b"job"
        (out / "run").mkdir(parents=True)
        (out / "run" / "loss.json").write_text("1")
        (out / "run" / ".lock").write_text("")
    assert bucket.find("memory://lab/out") == ["/lab/out/run/loss.json"]
    assert bucket.info("memory://lab/job.toml")["created"] == created
    with mirrored(["adapter", "memory://lab/out"]) as arguments:
        (Path(arguments[1]) / "run" / "loss.json").unlink()
        (Path(arguments[1]) / "more.json").write_text("2")
    assert bucket.find("memory://lab/out") == ["/lab/out/more.json"]


def test_what_was_made_before_an_error_is_uploaded(bucket):
    def stopped():
        with mirrored(["precompute", "-o", "memory://lab/bank"]) as arguments:
            Path(arguments[2]).mkdir(parents=True)
            (Path(arguments[2]) / "index.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert bucket.find("memory://lab/bank") == ["/lab/bank/index.json"]


def write_bundle(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter.bin", "frozen.bin", "manifest.json"):
        (folder / name).write_text(f"{name} {text}")


def upload(text: str) -> None:
    with mirrored(["export", "-o", "memory://lab/bundle"]) as arguments:
        write_bundle(Path(arguments[2]), text)


@pytest.mark.parametrize("puts", [0, 1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_an_upload_that_stops_leaves_nothing_that_looks_whole(
    bucket, tmp_path, monkeypatch, puts, before
):
    if before:
        upload("old")
    real, left = type(bucket).put_file, [puts]

    def failing(self, *arguments, **options):
        if not left[0]:
            raise OSError("the network is gone")
        left[0] -= 1
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "put_file", failing)
        with pytest.raises(BadInput, match="the network is gone"):
            upload("new")
    assert not bucket.exists("memory://lab/bundle/manifest.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(BadInput, match="not there"):
        fetched("memory://lab/bundle")
    upload("new")
    folder = fetched("memory://lab/bundle")
    assert {path.read_text() for path in folder.iterdir()} == {
        f"{name} new" for name in ("adapter.bin", "frozen.bin", "manifest.json")
    }


def test_a_scheme_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BadInput, match=r'pip install "edge-dit\[gs\]"'):
        fetched("gs://lab/bank")


# ---------------------------------------------------------------- a real S3 server


@pytest.fixture(scope="module")
def s3():
    """The environment of a command that sees an S3 server of this machine, with a bucket "lab"."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    code = (
        "from moto.server import ThreadedMotoServer; import time\n"
        "server = ThreadedMotoServer('127.0.0.1', 0); server.start()\n"
        "print('at', *server.get_host_and_port(), flush=True); time.sleep(10**6)"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    told = next(line for line in server.stdout if line.startswith("at "))  # after the server's own
    _, host, port = told.split()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.kill()
    server.wait()
    server.stdout.close()


AWS = "import s3fs, sys; fs = s3fs.S3FileSystem(); "


def python(code: str, s3: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, **s3}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def edge_dit(s3: dict[str, str], *arguments: object) -> str:
    return python("from edge_dit.cli import main; main()", s3, *arguments)


@pytest.mark.slow
def test_the_road_over_a_bucket_ends_at_the_files_of_a_disk(s3, workplace, tmp_path, monkeypatch):
    """Model, pictures, plan, bank, bundle, run and adapter are in the bucket; each command has an
    empty cache, as on another machine.
    """
    place = tmp_path / "place"
    place.mkdir()
    for name in ("model", "images"):
        shutil.copytree(workplace / name, place / name)
    text = (workplace / "job.toml").read_text()
    (place / "job.toml").write_text(
        text.replace('["onnx", "ort-training", "executorch"]', '["onnx"]')
    )
    put = AWS + "fs.mkdirs('lab', exist_ok=True); fs.put(sys.argv[1], 'lab/place', recursive=True)"
    python(put, s3, f"{place}/")
    for root in ("s3://lab/place", place):
        job, plan = f"{root}/job.toml", f"{root}/plan.json"
        bank, bundle, run = (f"{root}/{name}" for name in ("bank", "bundle", "run"))
        for number, command in enumerate(
            [
                ["plan", job, "-o", plan],
                ["precompute", job, "--plan", plan, "-o", bank],
                ["export", job, "--plan", plan, "-o", bundle],
                ["train", bundle, "--bank", bank, "-o", run, "--steps", 3],
                ["adapter", run, "-o", f"{root}/lora"],
            ]
        ):
            edge_dit({**s3, "XDG_CACHE_HOME": str(tmp_path / f"cache{number}")}, *command)
    names = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    get = AWS + "fs.get('lab/place', sys.argv[1], recursive=True)"
    python(get, s3, tmp_path / "back")
    for name in names:
        if name.parts[0] in ("bank", "lora"):
            assert (tmp_path / "back" / name).read_bytes() == (place / name).read_bytes(), name
    listed = python(AWS + "print(fs.find('lab/place'))", s3)
    assert "shard-00000" in listed
    assert "manifest.json" in listed
    assert ".uploading" not in listed


UPLOAD = """
import sys
from pathlib import Path
from edge_dit.store.remote import mirrored

with mirrored(["export", "-o", "s3://lab/killed"]) as arguments:
    folder = Path(arguments[2])
    folder.mkdir(parents=True)
    for number in range(200):
        (folder / f"frozen-{number}.bin").write_bytes(bytes(50_000))
    (folder / "manifest.json").write_text("{}")
"""


@pytest.mark.slow
def test_an_upload_that_is_killed_leaves_no_bundle(s3, tmp_path):
    python(AWS + "fs.mkdirs('lab', exist_ok=True)", s3)
    environment = {**os.environ, **s3, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-c", UPLOAD], env=environment)
    listing = AWS + "import json; print(json.dumps(fs.find('lab/killed')))"
    watch = AWS + (
        "import time\n"
        "while not any('.bin' in name for name in fs.find('lab/killed', refresh=True)):\n"
        "    time.sleep(0.01)\n"
        "    fs.invalidate_cache()\n"
        "print()"
    )
    python(watch, s3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = json.loads(python(listing, s3))
    assert there
    assert not any(name.endswith("manifest.json") for name in there)
    fetch = "from edge_dit.store.remote import fetched; print(fetched('s3://lab/killed'))"
    with pytest.raises(AssertionError, match="not there"):
        python(fetch, {**s3, "XDG_CACHE_HOME": str(tmp_path / "other")})
