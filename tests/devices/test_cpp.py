"""samples/cpp: the program trains like Python, byte for byte, and refuses what it should.

A run folder has the adapter, both moments, the number of updates and every loss, so equal files
mean equal bits. Python's side runs in a child with the same library of onnxruntime.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bundles
import pipelines
from edge_dit.app import api
from edge_dit.contract import bank as banks
from edge_dit.contract.adamw import AdamW
from edge_dit.contract.adapter import read_adapter, write_adapter
from edge_dit.contract.bank import (
    Crop,
    Draw,
    Index,
    Listed,
    begin,
    narrowed,
    write_prompts,
    write_shard,
)
from edge_dit.contract.bundle import ADAPTER, FileSpec, Manifest, TensorSpec, write_manifest
from edge_dit.contract.names import STORED
from edge_dit.errors import BadInput
from edge_dit.models.pipeline import quiet
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.store.documents import read_document, write_document
from edge_dit.store.files import sha256
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.run_folder import RunFolder
from loops import write_world

pytestmark = pytest.mark.devices

SOURCES = Path(__file__).resolve().parents[2] / "samples" / "cpp"
STEPS = 10
DRAWS = 3
"""Few, so that `STEPS` cover several epochs, each with an order of its own."""
RUN_FILES = ("state.safetensors", "adapter.safetensors", "loss.csv", "run.json")
EDGE_DIT = "from edge_dit.cli import main; main()"
REFUSED = 2


# ---------------------------------------------------------------- programs


def build(folder: Path, *settings: str) -> Path:
    """Build the sources; the program."""
    subprocess.run(["cmake", "-S", SOURCES, "-B", folder, *settings], check=True)
    subprocess.run(["cmake", "--build", folder, "-j", "2"], check=True)
    return folder / "edge-dit-train"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    executorch = Path(str(find_spec("executorch").submodule_search_locations[0]))
    return build(tmp_path_factory.mktemp("build"), f"-DEDGE_DIT_EXECUTORCH={executorch}")


@pytest.fixture(scope="module")
def careful(tmp_path_factory) -> Path:
    """The program without ExecuTorch, which stops at the first byte read out of bounds."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    settings = ("-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS={flags}")
    return build(tmp_path_factory.mktemp("careful"), *settings)


@dataclass(frozen=True)
class Trainers:
    """Both programs with one library of onnxruntime.

    Attributes:
        program: the one built here.
        packages: folder of the stock onnxruntime.
    """

    program: Path
    packages: Path

    @property
    def library(self) -> Path:
        return next((self.packages / "onnxruntime" / "capi").glob("libonnxruntime.so.*"))

    def cpp(self, *arguments: object, command: str = "train") -> subprocess.CompletedProcess[str]:
        program = self.program.with_name(f"edge-dit-{command}")
        words = [program, *arguments, "--onnxruntime", self.library]
        return subprocess.run(list(map(str, words)), capture_output=True, text=True)

    def python(
        self, *arguments: object, command: str = "train"
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(self.packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.run(
            [sys.executable, "-c", EDGE_DIT, command, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )

    def train(self, language: str, case: Case, run: Path, *more: object) -> None:
        """Train with a program, which must succeed."""
        options = (case.bundle, "--bank", case.bank, "-o", run, "--target", case.target, *more)
        done = getattr(self, language)(*options)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trainers(program: Path, stock: Callable[[], Path]) -> Trainers:
    return Trainers(program, stock())


# ---------------------------------------------------------------- what they train


@dataclass(frozen=True)
class Case:
    """What a program is given."""

    bundle: Path
    bank: Path
    target: str


@dataclass(frozen=True)
class Small:
    """A bundle of the onnx target made of a random model, with a bank.

    Attributes:
        variant, split, tail: of `bundles.made_variant`.
        weights, compute, recompute: of the export.
        dtype: of the bank.
        spoilt: draws without a finite target.
        smoothed: whether updates take several draws, and the adapter is averaged.
        lean: whether the optimizer keeps no first moment.
    """

    variant: str
    split: str = "across"
    tail: str = STORED
    weights: str = "float32"
    compute: str = "float32"
    recompute: bool = False
    dtype: str = "float32"
    spoilt: tuple[int, ...] = ()
    smoothed: bool = False
    lean: bool = False

    @property
    def adamw(self) -> AdamW:
        """The optimizer's hyper-parameters."""
        return bundles.LEAN if self.lean else bundles.ADAMW

    def write(self, folder: Path) -> Path:
        """Write bundle/ and bank/."""
        from edge_dit_export.targets.source import Source

        sub, batch = bundles.made_variant(self.variant, self.split, tail=self.tail)
        target = folder / "bundle" / "onnx"
        target.mkdir(parents=True)
        source = Source(
            sub,
            batch,
            self.adamw,
            bundles.CROPS,
            self.weights,
            recompute=self.recompute,
            compute=self.compute,
        )
        with quiet():
            facts = import_module("edge_dit_export.targets.onnx").write(source, target)
        lora = {name: p.detach().numpy() for name, p in sub.lora_parameters().items()}
        write_adapter(folder / "bundle" / ADAPTER, lora, rank=2, alpha=3.0)
        self._write_manifest(folder / "bundle", facts, batch, lora)
        self._write_bank(folder / "bank", bundles.draws(batch, DRAWS))
        return folder

    def write_spoilt(self, whole: Path, folder: Path) -> Path:
        """The same bundle, and its bank with `spoilt` draws."""
        shutil.copytree(whole / "bundle", folder / "bundle")
        bank = banks.Bank(whole / "bank")
        self._write_bank(folder / "bank", [bank[number] for number in range(DRAWS)])
        return folder

    def _write_manifest(self, folder: Path, facts: dict[str, Any], batch, lora) -> None:
        roles: tuple[tuple[str, Mapping[str, Any]], ...] = (("batch", batch), ("lora", lora))
        plan = {"model_name": "mödel", "rank": 2, "alpha": 3.0, "steps": STEPS, "seed": 2**40}
        if self.smoothed:
            plan |= {"schedule": "cosine", "warmup": 3, "accumulate": 2, "ema": 0.2}
        manifest = Manifest(
            family="sana",
            plan=plan,
            plan_hash="ab" * 32,
            tensors=[
                TensorSpec(name=name, shape=tuple(value.shape), role=role)
                for role, named in roles
                for name, value in named.items()
            ],
            optimizer=self.adamw,
            targets={"onnx": facts},
            tools={},
            files=listed(folder),
        )
        write_manifest(folder, manifest)

    def _write_bank(self, folder: Path, draws: list[dict[str, np.ndarray]]) -> None:
        for number in self.spoilt:
            draws[number]["target"] = np.full_like(draws[number]["target"], np.nan)
        crop = Crop(0, 0, 16)
        index = Index(
            plan_hash="ab" * 32,
            images=[Listed("ä.png", "")],
            prompts=["a toy"],
            draws=[Draw(n, 0, 0, (n + 1) / 7, 0.5, 0.25, crop) for n in range(DRAWS)],
            shard=2,
            dtype=self.dtype,
        )
        missing = begin(folder, index)
        write_prompts(folder, [{}])
        for shard in missing:
            members = {n: narrowed(draws[n], self.dtype) for n in index.members(shard)}
            write_shard(folder, shard, members)


def listed(folder: Path) -> list[FileSpec]:
    """A bundle's files, for its manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return [
        FileSpec(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256(p))
        for p in files
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Callable[[Small], Path]:
    """Writes a bundle with its bank, once."""
    written: dict[Small, Path] = {}

    def write(wanted: Small) -> Path:
        if wanted not in written:
            folder = tmp_path_factory.mktemp("small")
            if wanted.spoilt:
                written[wanted] = wanted.write_spoilt(write(replace(wanted, spoilt=())), folder)
            else:
                written[wanted] = wanted.write(folder)
        return written[wanted]

    return write


SANA = Small("sana", recompute=True)
ROUNDED = Small("sana", weights="int8")
IN_INT8 = replace(ROUNDED, compute="int8")
CASES = {
    "fused": (SANA, "onnx:fused"),
    "streamed": (SANA, "onnx:streamed"),
    "recompute": (SANA, "onnx:recompute"),
    "streamed, float16": (Small("sana", weights="float16"), "onnx:streamed"),
    "streamed, int8": (ROUNDED, "onnx:streamed"),
    "streamed, int4": (Small("sana", weights="int4"), "onnx:streamed"),
    "fused, int8 products": (IN_INT8, "onnx:fused"),
    "streamed, int8 products": (IN_INT8, "onnx:streamed"),
    "fused, rotated int8 products": (replace(ROUNDED, compute="int8-rotated"), "onnx:fused"),
    "inner skips": (Small("pixart-sigma", "apart", dtype="float16"), "onnx:streamed"),
    "joint attention, inner skips": (Small("flux-dev", "apart"), "onnx:streamed"),
    "joint attention, tail through": (Small("flux-schnell", "start", "through"), "onnx:streamed"),
    "weighted, tail fresh": (Small("sd3-medium", "start", "fresh"), "onnx:streamed"),
    # After 4 steps and after 10, three and seven draws count: a group is begun.
    "smoothed": (replace(SANA, smoothed=True, spoilt=(1,)), "onnx:fused"),
    "no first moment": (replace(SANA, lean=True), "onnx:fused"),
    "a draw is skipped": (replace(SANA, spoilt=(1,)), "onnx:streamed"),
}


@pytest.fixture(scope="module")
def surrounded(tmp_path_factory) -> Path:
    """A folder with bundle and bank of windows that are given what is around them."""
    folder = tmp_path_factory.mktemp("surrounded")
    wanted = {"window": "true", "surroundings": "true", "draws": DRAWS, "steps": STEPS}
    job = read_job(write_world(folder, "flux-dev", 'targets = ["onnx"]', **wanted))
    plan = make_plan(job)
    api.precompute(plan, api.read_pictures(job, plan), folder / "bank")
    api.export(plan, folder / "bundle", ["onnx"], job=job)
    return folder


@pytest.fixture
def case(request, small) -> Case:
    """A case of `CASES`, a target of the whole road's bundle, or one of `surrounded`."""
    if request.param in CASES:
        made, target = CASES[request.param]
        return Case(small(made) / "bundle", small(made) / "bank", target)
    kind, _, layout = request.param.partition(", ")
    if kind == "surroundings":
        folder = request.getfixturevalue("surrounded")
        return Case(folder / "bundle", folder / "bank", f"onnx:{layout}")
    road = request.getfixturevalue("road")
    return Case(road.bundle, road.bank, request.param)


def assert_same_run(run: Path, other: Path) -> None:
    for name in RUN_FILES:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


# ---------------------------------------------------------------- the same bits


WHOLE = ["onnx", "onnx:streamed", "executorch"]
SURROUNDED = ["surroundings, fused", "surroundings, streamed"]


@pytest.mark.parametrize("case", [*CASES, *WHOLE, *SURROUNDED], indirect=True)
def test_ten_steps_are_pythons(trainers: Trainers, case: Case, tmp_path: Path):
    if processor_refuses(case):
        done = trainers.cpp(case.bundle, "--bank", case.bank, "-o", tmp_path / "cpp")
        assert (done.returncode, "products in int8" in done.stderr) == (REFUSED, True)
        return
    for language in ("python", "cpp"):
        trainers.train(language, case, tmp_path / language, "--steps", STEPS)
    assert_same_run(tmp_path / "cpp", tmp_path / "python")
    trained, _, _ = read_adapter(tmp_path / "cpp" / ADAPTER)
    before, _, _ = read_adapter(case.bundle / ADAPTER)
    assert all((trained[name] != value).any() for name, value in before.items())


def processor_refuses(case: Case) -> bool:
    """Whether a bundle multiplies in int8, and this processor does that in 16 bits."""
    from edge_dit_runtime.sessions.int8 import products_are_exact
    from edge_dit_runtime.sessions.ort import onnxruntime

    facts = json.loads((case.bundle / "manifest.json").read_text())["targets"]["onnx"]
    return facts["compute"] != "float32" and not products_are_exact(onnxruntime("this test"))


@pytest.mark.parametrize("case", ["executorch"], indirect=True)
def test_packed_matrices_in_a_file_give_the_same_bits(
    trainers: Trainers, case: Case, tmp_path: Path
):
    """When they are packed, when they are found, and where the file holds something else."""
    packed = tmp_path / "packed"
    trainers.train("cpp", case, tmp_path / "without", "--steps", STEPS)
    for run in ("packs", "finds", "packs again"):
        if run == "packs again":
            packed.write_bytes(b"something else")
        trainers.train("cpp", case, tmp_path / run, "--steps", STEPS, "--packed", packed)
        assert packed.stat().st_size > 2**16
        assert_same_run(tmp_path / run, tmp_path / "without")


@pytest.mark.parametrize("case", ["fused", "streamed", "smoothed", "executorch"], indirect=True)
def test_each_goes_on_with_a_run_of_the_other(trainers: Trainers, case: Case, tmp_path: Path):
    runs = {(one, other): tmp_path / f"{one}-{other}" for one, other in ORDERS}
    for one, other in ORDERS:
        trainers.train(one, case, runs[one, other], "--steps", 4)
        trainers.train(other, case, runs[one, other], "--steps", STEPS, "--resume")
    for run in runs.values():
        assert_same_run(run, runs["python", "python"])


ORDERS = (("python", "python"), ("python", "cpp"), ("cpp", "python"), ("cpp", "cpp"))


# ---------------------------------------------------------------- painting


@pytest.fixture(scope="module")
def painter(tmp_path_factory) -> Path:
    """A folder with bundle/, which paints pictures larger than a tile, and bank/. Its latents are
    packed, and its guidance is rescaled.
    """
    folder = tmp_path_factory.mktemp("painter")
    job = read_job(write_world(folder, "qwen-image", resolution=320, draws=4, lr=0.01))
    plan = make_plan(job)
    api.precompute(plan, api.read_pictures(job, plan), folder / "bank")
    api.export(plan, folder / "bundle", ["onnx"], job=job)
    return folder


def test_paints_pythons_picture(trainers: Trainers, painter: Path, tmp_path: Path):
    """With a trained adapter, and without. The norms of rescaled guidance are added up in another
    order, so a value in 100,000 may be one level off.
    """
    case, run = Case(painter / "bundle", painter / "bank", "onnx:streamed"), tmp_path / "run"
    trainers.train("cpp", case, run, "--steps", 4)
    pictures = {}
    for adapter in ((), ("--run", run)):
        for language in ("cpp", "python"):
            out = tmp_path / f"{language}.png"
            asked = (case.bundle, pipelines.SHORT, "-o", out, "--seed", 5, *adapter)
            done = getattr(trainers, language)(*asked, command="paint")
            assert done.returncode == 0, done.stderr
            pictures[language, adapter] = np.asarray(Image.open(out)).astype(int)
        difference = np.abs(pictures["cpp", adapter] - pictures["python", adapter])
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-4
    assert pictures["cpp", ()].shape == (320, 320, 3)
    assert (pictures["cpp", ()] != pictures["cpp", ("--run", run)]).mean() > 0.01


def test_paints_no_prompt_that_it_lacks_and_no_other_bundles_run(
    trainers: Trainers, painter: Path, small, tmp_path: Path
):
    world = small(SANA)
    trainers.train("cpp", Case(world / "bundle", world / "bank", "onnx"), tmp_path / "run")
    out = tmp_path / "out.png"
    for more, message in (
        (("a cat",), "no prompt 'a cat'"),
        ((pipelines.SHORT, "--negative", "a cat"), "no negative prompt 'a cat'"),
        ((pipelines.SHORT, "--run", tmp_path / "run"), "a run of another bundle"),
    ):
        done = trainers.cpp(painter / "bundle", *more, "-o", out, command="paint")
        assert_refused(done, message, "edge-dit-paint")
    done = trainers.cpp(world / "bundle", "a toy", "-o", out, command="paint")
    assert_refused(done, "no parts of the loop", "edge-dit-paint")
    assert not out.exists()


# ---------------------------------------------------------------- stopping


MANY = 2000
"""Steps that take seconds: time for a signal in between."""


def test_paused_then_stopped_then_resumed(trainers: Trainers, small, tmp_path: Path):
    folder, run = small(SANA), tmp_path / "run"
    options = ["--bank", folder / "bank", "--target", "onnx:fused", "--steps", MANY]
    command = [trainers.program, folder / "bundle", *options, "-o", run]
    process = subprocess.Popen(
        [*map(str, command), "--onnxruntime", str(trainers.library)],
        stdout=subprocess.PIPE,
        text=True,
    )
    saved = RunFolder(run)
    try:
        until(process, "step 10 of")
        process.send_signal(signal.SIGUSR1)
        paused = until(process, "paused after step")
        assert paused.split()[-1] == str(saved.read().done)
        with pytest.raises(BadInput, match="in use"), saved.occupied():
            pass
        process.send_signal(signal.SIGUSR1)
        until(process, " of ")
        process.send_signal(signal.SIGINT)
        last = until(process, "steps done")
        assert process.wait() == 0
    finally:
        process.kill()
        process.communicate()
    done = saved.read().done
    assert int(paused.split()[-1]) < done < MANY
    assert f"{done} of {MANY}" in last
    assert not (run / ADAPTER).exists()
    assert not (run / ".lock").exists()

    more = ["--steps", done + 5]
    options[-2:] = more
    assert trainers.cpp(folder / "bundle", *options, "-o", run, "--resume").returncode == 0
    state = TensorFile(run / "state.safetensors").read()
    assert state["step"].tolist() == [done + 5]


def until(process: subprocess.Popen[str], begin: str) -> str:
    """The next line of output that has ``begin`` in it."""
    assert process.stdout is not None
    for line in process.stdout:
        if begin in line:
            return line
    raise AssertionError(f"the program ended without {begin!r}")


def test_waits_for_nobody_in_the_folder(trainers: Trainers, small, tmp_path: Path):
    """A run folder that Python trains into."""
    folder = small(SANA)
    with RunFolder(tmp_path / "run").occupied():
        done = trainers.cpp(folder / "bundle", "--bank", folder / "bank", "-o", tmp_path / "run")
    assert done.returncode == REFUSED
    assert "in use by another process" in done.stderr


def test_stops_where_no_draw_is_finite(trainers: Trainers, small, tmp_path: Path):
    folder = small(replace(SANA, spoilt=(0, 1, 2)))
    arguments = (folder / "bundle", "--bank", folder / "bank", "--target", "onnx:streamed")
    done = trainers.cpp(*arguments, "-o", tmp_path / "run", "--steps", 20)
    assert done.returncode == REFUSED
    assert "10 steps in a row without finite loss" in done.stderr
    assert "image ä.png" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_nothing_is_left_in_a_fresh_home(trainers: Trainers, small, tmp_path: Path):
    """test_telemetry.py shows that this build of onnxruntime writes there unless told not to."""
    folder, home = small(SANA), tmp_path / "home"
    home.mkdir()
    command = [trainers.program, folder / "bundle", "--bank", folder / "bank", "-o"]
    kept = {n: v for n, v in os.environ.items() if n != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [*command, tmp_path / "run", "--onnxruntime", trainers.library],
        env={**kept, "HOME": str(home)},
        check=True,
    )
    assert list(home.rglob("*")) == []


# ---------------------------------------------------------------- bad input


@dataclass(frozen=True)
class World:
    """A bundle, its bank and a run folder, to be spoilt."""

    bundle: Path
    bank: Path
    run: Path

    @property
    def options(self) -> tuple[object, ...]:
        return (self.bundle, "--bank", self.bank, "-o", self.run)

    def files(self) -> dict[str, bytes]:
        """What the run folder holds."""
        return {p.name: p.read_bytes() for p in self.run.iterdir()} if self.run.exists() else {}

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the manifest and write it with its new digest."""
        changed(self.bundle / "manifest.json", change)

    def list_again(self) -> None:
        """A manifest that lists the files as they are: a forged bundle."""
        files = [spec.model_dump() for spec in listed(self.bundle)]
        self.change(lambda manifest: manifest.update(files=files))


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON document and write it with its new digest."""
    raw = read_document(path, "a document", "")
    change(raw)
    write_document(path, raw)


@pytest.fixture
def world(small, tmp_path: Path) -> World:
    shutil.copytree(small(SANA), tmp_path / "world")
    made = tmp_path / "world"
    return World(made / "bundle", made / "bank", made / "run")


def flip(path: Path, at: float = 0.5) -> None:
    """Change one bit of a file, at this share of it."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def lead_out(world: World) -> None:
    graph = world.bundle / "onnx" / "head.onnx"
    shutil.move(graph, world.bundle.parent / "head.onnx")
    graph.symlink_to(world.bundle.parent / "head.onnx")


def weights_elsewhere(world: World) -> None:
    """A graph whose weights lie in any file of the user's."""
    import onnx

    path = world.bundle / "onnx" / "train_step.onnx"
    model = onnx.load(path, load_external_data=False)
    external = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in external.external_data if e.key == "location").value = "../../secret"
    path.write_bytes(model.SerializeToString())
    world.list_again()


def beyond_the_end(world: World) -> None:
    """A header that places a tensor outside of the file."""
    path = world.bundle / "onnx" / "frozen.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + 2**40, end + 2**40]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    world.list_again()


def another_bank(world: World) -> None:
    """The index of a bank with other pictures."""
    other = [{"name": "b.png", "sha256": "1"}]
    changed(world.bank / "index.json", lambda index: index.update(images=other))


def narrower_draws(world: World) -> None:
    """Draws of half the tokens."""
    index = banks.read_index(world.bank)
    batch = {t["name"]: t["shape"] for t in manifest_of(world)["tensors"] if t["role"] == "batch"}
    batch["entry"][1] //= 2
    zeros = {name: np.zeros(shape, np.float32) for name, shape in batch.items()}
    for shard in range(index.shards):
        write_shard(world.bank, shard, dict.fromkeys(index.members(shard), zeros))


def manifest_of(world: World) -> dict[str, Any]:
    return json.loads((world.bundle / "manifest.json").read_text())


SPOILT = {
    "no manifest": (lambda w: (w.bundle / "manifest.json").unlink(), "no manifest.json in it"),
    "cut manifest": (lambda w: cut(w.bundle / "manifest.json"), "unreadable (not JSON"),
    "edited manifest": (
        lambda w: (w.bundle / "manifest.json").write_text(
            (w.bundle / "manifest.json").read_text().replace("0.001", "0.002")
        ),
        "damaged or edited",
    ),
    "newer schema": (lambda w: w.change(lambda m: m.update(schema_version=3)), "schema version 3"),
    "no head": (
        lambda w: w.change(lambda m: m["targets"]["onnx"]["streamed"]["graphs"].pop("head.onnx")),
        "no graph 'head.onnx'",
    ),
    "a path for a name": (
        lambda w: w.change(lambda m: m["targets"]["onnx"].update(frozen=["../x"])),
        "no plain file name",
    ),
    "a weight of another name": (
        lambda w: w.change(
            lambda m: m["targets"]["onnx"]["streamed"]["blocks"][0]["weights"].update(x="y")
        ),
        "no weight 'y'",
    ),
    "no graph": (lambda w: (w.bundle / "onnx" / "head.onnx").unlink(), "head.onnx: missing"),
    "cut weights": (lambda w: cut(w.bundle / "onnx" / "frozen.safetensors"), "bytes; expected:"),
    "changed weights": (
        lambda w: flip(w.bundle / "onnx" / "frozen.safetensors", 0.9),
        "damaged or replaced",
    ),
    "changed graph": (lambda w: flip(w.bundle / "onnx" / "head.onnx"), "damaged or replaced"),
    "changed adapter": (lambda w: flip(w.bundle / ADAPTER, 0.9), "damaged or replaced"),
    "another file": (
        lambda w: (w.bundle / "onnx" / "x.onnx").write_text(""),
        "not in the manifest",
    ),
    "a graph elsewhere": (lead_out, "leads out of the bundle"),
    "weights elsewhere": (weights_elsewhere, "its weights lie in '../../secret'"),
    "tensors beyond the end": (beyond_the_end, "a file of frozen weights"),
    "no bank": (lambda w: shutil.rmtree(w.bank), "no index.json in it"),
    "bank of another plan": (
        lambda w: changed(w.bank / "index.json", lambda i: i.update(plan_hash="cd" * 32)),
        "belongs to plan cdcd",
    ),
    "incomplete bank": (
        lambda w: (w.bank / "shard-00001.safetensors").unlink(),
        "incomplete: no shard-00001.safetensors",
    ),
    "changed draw": (
        lambda w: [flip(path, 0.99) for path in w.bank.glob("shard-*")],
        "is not what was written",
    ),
    "shards of another bank": (another_bank, "it belongs to another bank"),
    "draws of another shape": (narrower_draws, "as the bundle takes it"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_input_is_refused(trainers: Trainers, world: World, fault: str):
    spoil, message = SPOILT[fault]
    spoil(world)
    done = trainers.cpp(*world.options, "--target", "onnx:streamed")
    assert_refused(done, message)
    # A draw is read when its step comes: then the run has begun, but nothing was trained.
    assert world.files().keys() <= {"run.json"}


def assert_refused(
    done: subprocess.CompletedProcess[str], message: str, program: str = "edge-dit-train"
) -> None:
    """One line that says it, and the exit code of bad input."""
    assert done.returncode == REFUSED, (done.returncode, done.stderr)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{program}: ")


def keep(world: World) -> None:
    """Change nothing: the options are at fault."""


RESUME = ("--resume",)
RESUMED: dict[str, tuple[Callable[[World], object], tuple[object, ...], str]] = {
    "cut state": (lambda w: cut(w.run / "state.safetensors"), RESUME, "damaged checkpoint"),
    "changed state": (
        lambda w: flip(w.run / "state.safetensors", 0.9),
        RESUME,
        "damaged checkpoint",
    ),
    "changed header": (
        lambda w: flip(w.run / "state.safetensors", 0.1),
        RESUME,
        "damaged checkpoint",
    ),
    "changed run.json": (lambda w: flip(w.run / "run.json", 0.3), RESUME, "run.json"),
    "another bundle's state": (
        lambda w: w.change(lambda m: m.update(tools={"x": "2"})),
        RESUME,
        "a run of target onnx, streamed, of bundle and bank",
    ),
    "another layout": (keep, (*RESUME, "--target", "onnx:fused"), "of target onnx, streamed"),
    "no such layout": (keep, (*RESUME, "--target", "onnx:whole"), "no layout 'whole'"),
    "no such target": (keep, (*RESUME, "--target", "ort-training"), "target 'ort-training'"),
    "not asked to resume": (keep, (), "a run is there already (2 of 2 steps)"),
    "no run": (lambda w: shutil.rmtree(w.run), RESUME, "no run to resume"),
    "no steps": (keep, (*RESUME, "--steps", 0), "--steps: '0'"),
    "unknown option": (keep, (*RESUME, "--speed", 1), "--speed: not an option"),
    "no library": (keep, (*RESUME, "--onnxruntime", "no.so"), "no.so: cannot be loaded"),
    "another library": (keep, (*RESUME, "--onnxruntime", "libm.so.6"), "no OrtGetApiBase"),
}


@pytest.mark.parametrize("fault", RESUMED)
def test_what_cannot_go_on_is_refused(trainers: Trainers, world: World, fault: str):
    """And the run stays as it is."""
    two_steps(trainers, world)
    spoil, options, message = RESUMED[fault]
    spoil(world)
    before = world.files()
    command = [trainers.program, *world.options, "--onnxruntime", trainers.library, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert_refused(done, message)
    assert world.files() == before


def two_steps(trainers: Trainers, world: World) -> None:
    """Train a run of two steps."""
    done = trainers.cpp(*world.options, "--target", "onnx:streamed", "--steps", 2)
    assert done.returncode == 0, done.stderr


def test_executorch_is_refused_where_it_is_left_out(careful: Path, road, tmp_path: Path):
    options = (road.bundle, "--bank", road.bank, "-o", tmp_path / "run", "--target", "executorch")
    done = subprocess.run(list(map(str, (careful, *options))), capture_output=True, text=True)
    assert_refused(done, "target executorch, which this build leaves out")
    assert not (tmp_path / "run").exists()


def test_a_bundle_of_schema_1_trains_to_the_same_adapter(trainers: Trainers, world: World):
    """It has one file of frozen weights, not a list, and says nothing of how products are computed
    or which blocks only run.
    """
    options = (*world.options, "--target", "onnx:streamed", "--steps", STEPS)
    assert trainers.cpp(*options).returncode == 0
    expected = (world.run / ADAPTER).read_bytes()
    shutil.rmtree(world.run)

    def earlier(manifest: dict[str, Any]) -> None:
        facts = manifest["targets"]["onnx"]
        manifest["schema_version"] = 1
        facts["frozen"] = facts["frozen"][0]
        del facts["compute"], facts["streamed"]["forward_only"]

    world.change(earlier)
    assert trainers.cpp(*options).returncode == 0
    assert (world.run / ADAPTER).read_bytes() == expected


# ---------------------------------------------------------------- files of strangers

JUNK = (
    None,
    True,
    -1,
    0,
    2**31,
    2**53,
    2**64,
    1e300,
    "",
    "x" * 999,
    "\ud800"[:0],
    [],
    {},
    [[]],
    [0],
)
"""What stands in the place of a value."""
CHANGES = 40
"""Changed files of each kind."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with one of its keys."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    inner = [(value, key) for key, _ in pairs]
    for _, item in pairs:
        if isinstance(item, (dict, list)):
            inner += places(item)
    return inner


def with_junk(value: Any, rng: np.random.Generator) -> None:
    """Replace one value by junk, or remove it."""
    holders = places(value)
    holder, key = holders[rng.integers(len(holders))]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = JUNK[rng.integers(len(JUNK))]


def with_noise(path: Path, rng: np.random.Generator) -> None:
    """Change, insert or remove bytes in the first part of a file, or the rest of it."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(len(data), 2000)))
        data[at : at + int(rng.integers(3))] = rng.bytes(int(rng.integers(3)))
    path.write_bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.2 else data)


def junk_in_header(path: Path, rng: np.random.Generator) -> None:
    """Junk in a safetensors header, without digests, or a tensor that lies elsewhere."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    if rng.random() < 0.5:
        with_junk(header, rng)
    else:
        entry = header[list(header)[rng.integers(len(header))]]
        by = int(rng.integers(1, 2 ** int(rng.integers(1, 48))))
        entry["data_offsets"] = [place + by for place in entry["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


FILES = {
    "manifest.json": lambda w, rng: w.change(lambda m: with_junk(m, rng)),
    "index.json": lambda w, rng: changed(w.bank / "index.json", lambda i: with_junk(i, rng)),
    "manifest's bytes": lambda w, rng: with_noise(w.bundle / "manifest.json", rng),
    "state": lambda w, rng: with_noise(w.run / "state.safetensors", rng),
    "run.json": lambda w, rng: changed(w.run / "run.json", lambda run: with_junk(run, rng)),
    "graph": lambda w, rng: (with_noise(w.bundle / "onnx" / "head.onnx", rng), w.list_again()),
    "adapter": lambda w, rng: (junk_in_header(w.bundle / ADAPTER, rng), w.list_again()),
}


@pytest.mark.parametrize("file", FILES)
def test_no_file_leads_out_of_bounds(careful: Path, trainers: Trainers, world: World, file: str):
    """No file makes the program read what is not its own. It has no onnxruntime here, so that every
    run ends with a refusal.
    """
    if file in ("state", "run.json"):
        two_steps(trainers, world)
    whole = world.bundle.parent.parent / "whole"
    shutil.copytree(world.bundle.parent, whole)
    rng = np.random.default_rng(0)
    messages = set()
    for _ in range(CHANGES):
        shutil.rmtree(world.bundle.parent)
        shutil.copytree(whole, world.bundle.parent)
        FILES[file](world, rng)
        resume = ["--resume"] if world.run.exists() else []
        command = [careful, *world.options, "--onnxruntime", "no.so", *resume]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert_refused(done, "")
        messages.add(done.stderr)
    assert len(messages) > 1, messages
