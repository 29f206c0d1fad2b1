"""A bank, a bundle and a session of a few numbers: what surrounds training, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from edge_dit.contract import bank
from edge_dit.contract.adamw import AdamW
from edge_dit.contract.adapter import write_adapter
from edge_dit.contract.bank import Crop
from edge_dit.contract.bundle import (
    ADAPTER,
    Bundle,
    FileSpec,
    Manifest,
    TensorSpec,
    open_bundle,
    write_manifest,
)
from edge_dit.store.files import sha256
from edge_dit_runtime.sessions.state import take, take_step

LORA = {"transformer.b.lora_A.weight": (2, 3), "transformer.b.lora_B.weight": (3, 2)}
BATCH = {"cond.x": (1, 2), "entry": (1, 4), "target": (1, 2)}
PLAN_HASH = "0123456789abcdef" * 4
DRAWS = 6


def write_bank(folder: Path, plan_hash: str = PLAN_HASH, seed: int = 0, shard: int = 4) -> Path:
    """A bank of `DRAWS` draws in two shards."""
    draws = [bank.Draw(n, 0, 0, 0.5, 0.25, 0.75, Crop(0, 0, 8)) for n in range(DRAWS)]
    index = bank.Index(plan_hash, [bank.Listed("a.png", str(seed))], ["red"], draws, shard)
    missing = bank.begin(folder, index)
    rng = np.random.default_rng(seed)
    bank.write_prompts(folder, [{"cond.x": rng.random((1, 2), np.float32)}])
    for number in missing:
        members = {}
        for n in index.members(number):
            own = np.random.default_rng([seed, n])  # whatever was written before
            members[n] = {name: own.random(BATCH[name], np.float32) for name in ("entry", "target")}
        bank.write_shard(folder, number, members)
    return folder


def graph(path: Path, location: str | None = None) -> None:
    """An ONNX file y = x + w, with w in another file if ``location`` says so."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], np.arange(4, dtype=np.float32))
    if location is not None:
        del tensor.float_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def write_bundle(folder: Path, location: str | None = None, rank: int = 2) -> Path:
    """A bundle whose train step is `graph`.

    Args:
        folder: where it goes.
        location: of the graph's weight.
        rank: of the adapter in it; the manifest says 2.
    """
    (folder / "onnx").mkdir(parents=True)
    graph(folder / "onnx" / "train_step.onnx", location)
    (folder / "onnx" / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    rng = np.random.default_rng(1)
    shapes = {n: tuple(rank if d == 2 else d for d in shape) for n, shape in LORA.items()}
    adapter = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    write_adapter(folder / ADAPTER, adapter, rank, 2.0)
    manifest = Manifest(
        family="sana",
        plan={"model_name": "model", "rank": 2, "alpha": 2.0, "steps": 12, "seed": 3},
        plan_hash=PLAN_HASH,
        tensors=[
            *(TensorSpec(name=n, shape=s, role="batch") for n, s in BATCH.items()),
            *(TensorSpec(name=n, shape=s, role="lora") for n, s in LORA.items()),
        ],
        optimizer=AdamW(lr=1e-2),
        targets={
            "onnx": {
                "frozen": "w.bin",
                "graphs": {"train_step.onnx": {"inputs": [], "outputs": []}},
            }
        },
        tools={},
        files=[],
    )
    write_manifest(folder, manifest)
    return relist(folder)


def relist(folder: Path) -> Path:
    """Make the manifest list what is there, as a forger would."""
    names = [ADAPTER, *(f"onnx/{path.name}" for path in (folder / "onnx").iterdir())]
    files = [
        FileSpec(path=n, bytes=(folder / n).stat().st_size, sha256=sha256(folder / n))
        for n in sorted(names)
    ]
    write_manifest(folder, open_bundle(folder).manifest.model_copy(update={"files": files}))
    return folder


class SmallSession:
    """A `Session` whose loss is sum((x - adapter)^2), stepped by momentum."""

    def __init__(self, manifest: Manifest) -> None:
        self.lr = 0.0
        self._shapes = manifest.shapes("lora")
        self._step = 0
        self._moment = {n: np.zeros(s, np.float32) for n, s in self._shapes.items()}

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        pull = np.float32(draw["entry"].sum() - draw["target"].sum())
        self._gradients = {n: value - pull for n, value in self._adapter.items()}
        return float(sum((value**2).sum() for value in self._gradients.values()))

    def update(self) -> None:
        self._step += 1
        for name, gradient in self._gradients.items():
            self._moment[name] = np.float32(0.9) * self._moment[name] + gradient
            self._adapter[name] = self._adapter[name] - np.float32(self.lr) * self._moment[name]

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        loss = self.backward(draw)
        self.update()
        return loss

    def gradients(self) -> dict[str, np.ndarray]:
        return dict(self._gradients)

    def set_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        self._gradients = dict(gradients)

    def adapter(self) -> dict[str, np.ndarray]:
        return dict(self._adapter)

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        self._adapter = take(adapter, self._shapes)

    def state_dict(self) -> dict[str, np.ndarray]:
        kinds = {"adapter.": self._adapter, "exp_avg.": self._moment}
        state = {
            kind + name: value for kind, named in kinds.items() for name, value in named.items()
        }
        return {**state, "step": np.array([self._step], np.int64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self._step = take_step(state)
        self._adapter = take(state, self._shapes, "adapter.")
        self._moment = take(state, self._shapes, "exp_avg.")


def open_small(bundle: Bundle, target: str, layout: str) -> SmallSession:
    """In place of `edge_dit_runtime.session.open_session`."""
    return SmallSession(bundle.manifest)
