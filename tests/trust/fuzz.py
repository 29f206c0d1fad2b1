"""Mutated inputs for every reader of files: what they may do is refuse.

    python tests/trust/fuzz.py --inputs 10000             all readers; figures at the end
    python tests/trust/fuzz.py --reader state --seed 7    one of them
    python tests/trust/fuzz.py --atheris 1800             coverage-guided, the pure-Python parsers

A reader may raise the errors it documents and nothing else, take `SECONDS` of processor time and
twice the file plus `SPARE` bytes of memory. Where a file carries digests, what is accepted must be
what was written. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 5
SPARE = 64 * 2**20
OWN = 2**16
"""Bytes of Python's own objects around a file: names, an error and its traceback."""
DIGEST = "sha256"
HUGE = (0, -1, 1, 2**31, 2**48, 2**63, -(2**63), 2**64, 10**30, 10**400)
STRANGE: tuple[Any, ...] = (
    *HUGE,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "x" * 10000,
    [],
    {},
    [[]],
    {"": 0},
)


class Hang(BaseException):
    """A reader took longer than `SECONDS`; no reader can catch it by mistake."""


@dataclass(frozen=True)
class Reader:
    """One reader, and a file it accepts.

    Attributes:
        name: of the reader.
        path: of the file that is mutated.
        read: reads it; what it returns can be compared.
        errors: that it documents.
        kind: of the file: "json", "tensors", "toml" or "onnx".
        hashed: whether the file carries digests of all that ``read`` returns.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    errors: tuple[type[Exception], ...]
    kind: str
    hashed: bool


@dataclass
class Figures:
    """What became of the inputs of one reader."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    memory: int = 0
    findings: list[str] = field(default_factory=list)

    def in_words(self, name: str) -> str:
        return (
            f"{name:18} {self.inputs:6} inputs, {self.accepted:5} accepted, slowest "
            f"{self.slowest * 1000:6.1f} ms, most memory {self.memory / 2**20:5.1f} MiB, "
            f"{len(self.findings)} findings"
        )


JOB = """
[model]
path = "model"

[data]
images = "images"
prompt = "a sks toy"

[plan]
head_skip = 1
tail_skip = 1
ram = "3GiB"

[train]
resolution = 64
patch = 32
rank = 4
lora_targets = ["attn1.to_q"]
lr = 1e-3

[export]
targets = ["onnx"]
"""


def readers(folder: Path) -> list[Reader]:
    """Every reader, over valid files below ``folder``."""
    import numpy as np
    import small

    from edge_dit.budget.footprint import REFERENCE, read_profile, write_profile
    from edge_dit.contract.adapter import (
        PEFT_CONFIG,
        read_adapter,
        read_lora,
        read_peft,
        write_adapter_folder,
    )
    from edge_dit.contract.adapter_formats import PEFT, format_of
    from edge_dit.contract.bank import read_index, shard_path
    from edge_dit.contract.bundle import open_bundle
    from edge_dit.contract.certificate import (
        PARITY,
        Certificate,
        Difference,
        Draws,
        TargetResult,
        read_certificate,
        write_certificate,
    )
    from edge_dit.errors import BadInput
    from edge_dit.planning.job import read_job
    from edge_dit.planning.plan import Plan, read_plan
    from edge_dit.planning.selection import Selection, read_selection, write_selection
    from edge_dit.store.onnx_external import external_locations
    from edge_dit.store.tensors import TensorFile, write_tensors
    from edge_dit_runtime.run_folder import Run, RunFolder
    from edge_dit_runtime.sessions.mapped import MappedTensors

    bundle, bank = small.write_bundle(folder / "bundle", "w.bin"), small.write_bank(folder / "bank")
    lora = {n: np.ones(shape, np.float32) for n, shape in small.LORA.items()}
    plan = Plan(
        family="sana",
        model=folder / "model",
        model_name="model",
        model_hash="0" * 64,
        layers=4,
        head_skip=1,
        tail_skip=1,
        inner_skips=[],
        s_min=32,
        s_max=64,
        multiple=8,
        text_tokens=15,
        rank=4,
        alpha=8.0,
        lora_targets=["attn1.to_q"],
        optimizer=open_bundle(bundle).manifest.optimizer,
        steps=12,
        draws=10,
        seed=3,
        targets=["onnx"],
    )
    (folder / "plan.json").write_text(plan.model_dump_json())
    selection = Selection(
        model_hash="0" * 64,
        layers=2,
        method="loss-frozen",
        embedding="",
        subjects=["toy"],
        steps=3,
        prompts=[],
        seeds=[],
        draws=4,
        over="held-out images",
        head=[0.0, 0.5, 1.0],
        tail=[0.0, 0.25, 0.5],
        seconds=1.5,
    )
    write_selection(selection, folder / "selection.json")
    write_profile(REFERENCE, folder / "profile.json")
    for name in ("model", "images"):
        (folder / name).mkdir()
    (folder / "model" / "model_index.json").write_text("{}")
    (folder / "job.toml").write_text(JOB)
    write_adapter_folder(folder / "peft", lora, 2, 2.0, "model", PEFT)
    app = format_of("qwen_image", "kohya")
    write_adapter_folder(folder / "app", lora, 2, 2.0, "model", app)
    run = Run(
        bundle="bundle",
        bank="bank",
        target="onnx",
        layout="fused",
        manifest_sha256="0" * 64,
        bank_sha256="0" * 64,
        family="sana",
        base_model="model",
        rank=2,
        alpha=2.0,
        steps=12,
        done=4,
    )
    (folder / "run").mkdir()
    RunFolder(folder / "run").begin(run, {})
    state = {f"adapter.{name}": value for name, value in lora.items()}
    write_tensors(folder / "run" / "state.safetensors", state, {"run": json.dumps(asdict(run))})
    opened = open_bundle(bundle)
    loss = Difference("loss", "loss", 1e-9, 1e-9, 1.0, 1e-9, 1e-4)
    result = TargetResult(Draws([0, 1], [2], [0, 0]), [loss])
    write_certificate(opened, Certificate(opened.manifest_sha256, "torch", 1, {"onnx": result}))

    def arrays(named: dict[str, Any]) -> Any:
        return {n: (str(v.dtype), v.shape, v.tobytes()) for n, v in named.items()}

    def peft() -> Any:
        return arrays(read_peft(folder / "peft").tensors)

    def exported() -> Any:
        found = read_lora(folder / "app" / app.file)
        return arrays(found.tensors), found.rank, found.alpha, found.format

    def mapped() -> Any:
        read = MappedTensors(folder / "mapped.safetensors")  # whose content the manifest has
        return {name: (str(read[name].dtype), read[name].shape) for name in lora}

    def tensors(path: Path) -> Callable[[], Any]:
        return lambda: arrays(TensorFile(path).read())

    def adapter() -> Any:
        found, rank, alpha = read_adapter(bundle / "adapter.safetensors")
        return arrays(found), rank, alpha

    def certificate() -> Any:
        return read_certificate(open_bundle(bundle))

    def trained() -> Any:
        found, read = RunFolder(folder / "run").adapter()
        return arrays(found), repr(read)

    write_tensors(folder / "mapped.safetensors", lora)
    shard, graph = shard_path(bank, 0), bundle / "onnx" / "train_step.onnx"
    bad: tuple[type[Exception], ...] = (BadInput,)
    plainly: tuple[type[Exception], ...] = (OSError, ValueError)
    rows: list[tuple[str, Path, Callable[[], Any], tuple[type[Exception], ...], str, bool]] = [
        ("manifest", bundle / "manifest.json", lambda: open_bundle(bundle), bad, "json", True),
        ("index", bank / "index.json", lambda: read_index(bank), bad, "json", True),
        ("plan", folder / "plan.json", lambda: read_plan(folder / "plan.json"), bad, "json", False),
        (
            "selection",
            folder / "selection.json",
            lambda: read_selection(folder / "selection.json"),
            bad,
            "json",
            True,
        ),
        (
            "profile",
            folder / "profile.json",
            lambda: read_profile(folder / "profile.json"),
            bad,
            "json",
            True,
        ),
        (
            "run",
            folder / "run" / "run.json",
            lambda: RunFolder(folder / "run").read(),
            bad,
            "json",
            True,
        ),
        ("certificate", bundle / PARITY, certificate, (), "json", False),
        ("job", folder / "job.toml", lambda: read_job(folder / "job.toml"), bad, "toml", False),
        ("tensors", shard, tensors(shard), plainly, "tensors", True),
        ("mapped", folder / "mapped.safetensors", mapped, bad, "tensors", True),
        ("adapter", bundle / "adapter.safetensors", adapter, bad, "tensors", True),
        ("exported", folder / "app" / app.file, exported, bad, "tensors", True),
        ("peft", folder / "peft" / PEFT.file, peft, bad, "tensors", True),
        ("peft config", folder / "peft" / PEFT_CONFIG, peft, bad, "json", False),
        ("state", folder / "run" / "state.safetensors", trained, bad, "tensors", True),
        (
            "external data",
            graph,
            lambda: external_locations(graph.read_bytes()),
            (ValueError,),
            "onnx",
            False,
        ),
    ]
    return [Reader(*row) for row in rows]


# Mutations of bytes


def flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def strange_byte(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice(b'\x00\x01\x7f\x80\xff"{}[],:\\-.e9 \n')


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def cut(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 2, 8, 64, 512))]


def repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 8, 64, 512))]
    data[start:start] = piece * rng.choice((1, 2, 50))


def insert(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def move(rng: random.Random, data: bytearray) -> None:
    start, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((8, 64, 512))]
    data[other : other + len(piece)] = piece


def length(rng: random.Random, data: bytearray) -> None:
    """A number of eight bytes, as at the head of a safetensors file."""
    start = rng.choice((0, 0, rng.randrange(len(data) + 1)))
    data[start : start + 8] = struct.pack("<Q", rng.choice(HUGE) % 2**64)


def digits(rng: random.Random, data: bytearray) -> None:
    """A number in the text becomes another."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if found:
        place = rng.choice(found)
        new = rng.choice((*map(str, HUGE), "9" * 5000, "1e999", "NaN", "-Infinity", "0x10", "1_0"))
        data[place.start() : place.end()] = new.encode()


def nested(rng: random.Random, data: bytearray) -> None:
    start = rng.choice((0, rng.randrange(len(data) + 1)))
    data[start:start] = rng.choice((b"[", b'{"a":', b"a.", b"((")) * rng.choice((100, 2000, 20000))


BYTES = (flip, strange_byte, truncate, cut, repeat, insert, move, length, digits, nested)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(BYTES)(rng, changed)
    return bytes(changed)


# Mutations of what the bytes say


def mutate_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one place in it changed, added, repeated or gone."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        what = rng.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.2:
            return {**value, str(rng.choice(STRANGE)): rng.choice(STRANGE)}
        return {**value, key: mutate_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        what = rng.random()
        if what < 0.1:
            return value[:place] + value[place + 1 :]
        if what < 0.2:
            return value[:place] + [value[place]] * rng.choice((2, 3, 1000)) + value[place:]
        return [*value[:place], mutate_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(STRANGE)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def sealed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def mutate_document(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    """A JSON file; now and then with a digest that is right, as a forger's."""
    value = mutate_value(rng, json.loads(data))
    forged = isinstance(value, dict) and DIGEST in value and rng.random() < 0.5
    if forged:
        value[DIGEST] = sealed({k: v for k, v in value.items() if k != DIGEST})
    return dumped(value), forged


def mutate_tensors(rng: random.Random, data: bytes) -> tuple[bytes, bool]:
    """A safetensors file whose header says something else, now and then with right digests."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = mutate_value(rng, header)
    forged = rng.random() < 0.5
    if forged and isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        metadata = header["__metadata__"]
        types = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
        kinds = {
            name: (types.get(str(entry.get("dtype"))), entry.get("shape"))
            for name, entry in header.items()
            if name != "__metadata__" and isinstance(entry, dict)
        }
        metadata[DIGEST] = sealed([{k: v for k, v in metadata.items() if k != DIGEST}, kinds])
    raw = dumped(header)
    return struct.pack("<Q", len(raw)) + raw + data[8 + size :], forged


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """A TOML file with lines repeated, gone, moved or with other values."""
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    what = rng.randrange(4)
    if what == 0:
        lines.insert(rng.randrange(len(lines)), lines[place])
    elif what == 1:
        del lines[place]
    elif what == 2 and "=" in lines[place]:
        new = json.dumps(rng.choice(STRANGE))
        lines[place] = f"{lines[place].partition('=')[0]}= {new}"
    else:
        rng.shuffle(lines)
    return "\n".join(lines).encode()


def mutate(rng: random.Random, kind: str, data: bytes, other: bytes) -> tuple[bytes, bool]:
    """A mutated file, and whether a forger made its digests anew."""
    what = rng.random()
    if what < 0.1:  # a splice with another reader's file
        return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :], False
    if what < 0.5:
        if kind == "json":
            return mutate_document(rng, data)
        if kind == "tensors":
            return mutate_tensors(rng, data)
        if kind == "toml":
            return mutate_lines(rng, data), False
    return mutate_bytes(rng, data), False


# Judging


@contextmanager
def no_longer_than(seconds: float) -> Any:
    """Interrupt what takes more processor time; where the system has no such clock, nothing."""
    if not hasattr(signal, "ITIMER_VIRTUAL"):
        yield
        return

    def ring(_number: int, _frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def promises(kind: str, data: bytes) -> bool:
    """Whether a file still carries digests; safetensors files of others and profiles need not."""
    try:
        if kind == "tensors":
            size = int.from_bytes(data[:8], "little")
            return DIGEST in json.loads(data[8 : 8 + size])["__metadata__"]
        return DIGEST in json.loads(data)
    except (ValueError, KeyError, TypeError):
        return False


def judge(reader: Reader, data: bytes, forged: bool, want: Any, figures: Figures) -> None:
    """Let a reader read ``data``, and note what it should not have done."""
    reader.path.write_bytes(data)
    complaint = ""
    tracemalloc.reset_peak()
    base = tracemalloc.get_traced_memory()[0]
    started = time.process_time()
    try:
        with no_longer_than(SECONDS):
            found = reader.read()
        figures.accepted += 1
        if reader.hashed and not forged and found != want and promises(reader.kind, data):
            complaint = "accepted a corruption"
    except reader.errors:
        pass
    except Hang:
        complaint = f"took more than {SECONDS} s"
    except Exception as error:
        complaint = f"raised {error!r:.200}"
    spent = time.process_time() - started
    memory = tracemalloc.get_traced_memory()[1] - base
    if memory > 2 * len(data) + SPARE + OWN:
        complaint = f"took {memory} bytes of memory for a file of {len(data)}"
    if complaint:
        figures.findings.append(f"{reader.name}: {complaint}: {data[:300]!r} ({len(data)} bytes)")
    figures.inputs += 1
    figures.seconds += spent
    figures.slowest = max(figures.slowest, spent)
    figures.memory = max(figures.memory, memory)


def fuzz(reader: Reader, inputs: int, seed: int, others: list[bytes]) -> Figures:
    """Give a reader that many mutated inputs.

    Args:
        reader: to try.
        inputs: how many.
        seed: of the mutations.
        others: files of other readers, for splices.
    """
    whole = reader.path.read_bytes()
    want = reader.read()
    figures = Figures()
    tracemalloc.start()
    try:
        for number in range(inputs):
            rng = random.Random(f"{seed} {reader.name} {number}")
            data, forged = mutate(rng, reader.kind, whole, rng.choice(others))
            judge(reader, data, forged, want, figures)
    finally:
        tracemalloc.stop()
        reader.path.write_bytes(whole)
    assert reader.read() == want
    return figures


def guided(seconds: int, corpus: Path, without: list[str]) -> None:
    """Run atheris over the readers and what they parse with; it ends the process itself."""
    import atheris

    with atheris.instrument_imports(include=["edge_dit", "json", "tomllib"]):
        from edge_dit.store import documents, onnx_external
        from edge_dit.store.tensors import read_header

        folder = Path(tempfile.mkdtemp())
        every = [reader for reader in readers(folder) if reader.name not in without]
    import io

    wholes = [reader.path.read_bytes() for reader in every]

    def parse(data: bytes) -> None:
        if not data:
            return
        kind, rest = data[0] % (len(every) + 3), data[1:]
        if kind < len(every):
            figures = Figures()
            judge(every[kind], rest, True, None, figures)
            every[kind].path.write_bytes(wholes[kind])
            if figures.findings:
                raise AssertionError(figures.findings[0])
            return
        call = (
            lambda: documents.parse_json(rest),
            lambda: read_header(io.BytesIO(rest)),
            lambda: onnx_external.external_locations(rest),
        )[kind - len(every)]
        with suppress(ValueError):
            call()

    corpus.mkdir(parents=True, exist_ok=True)
    for number, reader in enumerate(every):
        (corpus / f"seed-{number}").write_bytes(bytes([number]) + reader.path.read_bytes())
    tracemalloc.start()
    options = [f"-max_total_time={seconds}", "-timeout=30", "-max_len=8192", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *options], parse)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--without", action="append", default=[], help="not this one")
    parser.add_argument("--atheris", type=int, metavar="SECONDS")
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "corpus")
    asked = parser.parse_args()
    if asked.atheris:
        guided(asked.atheris, asked.corpus, asked.without)
        return
    findings = []
    with tempfile.TemporaryDirectory() as name:
        every = readers(Path(name))
        others = [reader.path.read_bytes() for reader in every]
        for reader in every:
            if asked.reader in (None, reader.name) and reader.name not in asked.without:
                figures = fuzz(reader, asked.inputs, asked.seed, others)
                print(figures.in_words(reader.name), flush=True)
                findings += figures.findings
    for finding in findings[:50]:
        print(finding)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
