"""Mistakes planted in a bundle, by kind: the places are found by scanning its files.

A kind is a way to be wrong ("a row zeroed"). `sites` scans a bundle and yields one `Mutant` for
every kind and place that fits. Planting one changes bytes, and stamps the manifest anew, so that
nothing but the comparison with PyTorch and with the plan can tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graphs import Graph, set_attribute
from onnx import NodeProto, external_data_helper, numpy_helper, shape_inference

from edge_dit.contract.adapter import read_adapter, with_random_b, write_adapter
from edge_dit.contract.bundle import ADAPTER, Bundle, FileSpec, open_bundle, write_manifest
from edge_dit.contract.targets import (
    FUSED,
    HEAD,
    OPTIMIZER,
    OPTIMIZER_MODEL,
    SAMPLER,
    STEP_FILES,
    STREAMED,
    TRAINING_MODEL,
)
from edge_dit.store.files import sha256
from edge_dit.store.tensors import TensorFile, write_tensors

CLAIMS = "manifest"
"""In place of a target: what manifest and adapter say."""
Plant = Callable[[Path], None]
Change = Callable[[np.ndarray], np.ndarray]
Place = tuple[str | None, str | None]
"""Block and module, as in `Mutant`."""


@dataclass(frozen=True)
class Site:
    """Where a bundle is wrong, and in which way.

    Attributes:
        kind: the way of being wrong.
        family: of the bundle.
        target, layout: that are compared.
        file: that changes, relative to the bundle.
        site: where in the file.
        block: of the model, "transformer_blocks.1"; None where it is not one block's.
        module: of the block, "attn1.to_q"; None where it is not one module's.
    """

    kind: str
    family: str
    target: str
    layout: str
    file: str
    site: str
    block: str | None
    module: str | None

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return "|".join((self.family, self.target, self.layout, self.file, self.kind, self.site))


@dataclass(frozen=True)
class Mutant(Site):
    """One planted mistake.

    Attributes:
        plant: changes the file in a copy of the bundle.
    """

    plant: Plant


def relist(bundle: Path) -> None:
    """Let the manifest tell the truth of the files that are there."""
    manifest = open_bundle(bundle).manifest
    files = [
        FileSpec(path=file.path, bytes=path.stat().st_size, sha256=sha256(path))
        if (path := bundle / file.path).is_file()
        else file
        for file in manifest.files
    ]
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


# ---------------------------------------------------------------- places


_PLACE = re.compile(r"(?:^|\.)((?:\w+_)?transformer_blocks\.\d+)\.(.+)$")


def place_of(name: str) -> Place:
    """(block, module) that a tensor belongs to, by its name in any file of a bundle; a tensor of
    the block itself has no module.
    """
    found = _PLACE.search(re.sub(r"_{2,}", ".", name))
    return (found[1], module_of(found[2])) if found else (None, None)


def module_of(name: str) -> str | None:
    """The module of a tensor by its name within a block; None for a tensor of the block itself."""
    name = name.removeprefix("grad.")
    found = re.match(r"(.+?)(\.base_layer|\.lora_[AB])?\.(weight|bias)\b", name)
    return found[1] if found else None


# ---------------------------------------------------------------- weights


def scaled(value: np.ndarray) -> np.ndarray:
    return value * np.float32(1.05)


def row_zeroed(value: np.ndarray) -> np.ndarray:
    value[len(value) // 2] = 0
    return value


def rows_swapped(value: np.ndarray) -> np.ndarray:
    value[[0, -1]] = value[[-1, 0]]
    return value


def noisy(value: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 1e-2, value.shape)
    return (value + noise).astype(np.float32)


def transposed(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T)


WEIGHT_KINDS: Mapping[str, Change] = {
    "weight: 5 % too large": scaled,
    "weight: a row zeroed": row_zeroed,
    "weight: two rows swapped": rows_swapped,
    "weight: noise of 1e-2": noisy,
    "weight: transposed": transposed,
}
OTHER_BLOCK = "weight: that of another block"


def weight_changes(weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, name, new value) of every weight that a kind changes."""
    for name, value in weights.items():
        for kind, change in WEIGHT_KINDS.items():
            square = value.ndim == 2 and value.shape[0] == value.shape[1]
            if kind == "weight: transposed" and not square:
                continue
            new = change(value.copy())
            if not np.array_equal(new, value):
                yield kind, name, new
        for other, stored in weights.items():
            if other != name and place_of(other)[1] == place_of(name)[1] is not None:
                same = stored.shape == value.shape and not np.array_equal(stored, value)
                if same and _last(other) == _last(name):
                    yield OTHER_BLOCK, name, stored
                    break


def _last(name: str) -> str:
    """What a tensor is to its module: "weight"."""
    return re.split(r"\.|__", name)[-1]


def _store_tensor(bundle: Path, file: str, name: str, value: np.ndarray) -> None:
    tensors = TensorFile(bundle / file).read()
    tensors[name] = np.ascontiguousarray(value)
    write_tensors(bundle / file, tensors)


def _store_bytes(bundle: Path, file: str, offset: int, new: bytes) -> None:
    raw = bytearray((bundle / file).read_bytes())
    raw[offset : offset + len(new)] = new
    (bundle / file).write_bytes(bytes(raw))


# ---------------------------------------------------------------- graphs


UNARY = (
    *("Relu", "Sigmoid", "Neg", "Sqrt", "Reciprocal", "Tanh", "Softmax", "Abs", "Round", "Floor"),
    *("Erf", "Gelu", "QuickGelu", "ReluGrad", "QuickGeluGrad", "SoftmaxGrad_13"),
)
"""Their first argument can stand for their result."""
BINARY = ("Add", "Sub", "Mul", "Div")
OTHERS = {"Add": "Sub", "Sub": "Add", "Mul": "Add", "Div": "Mul", "ReduceMean": "ReduceSum"}
FEW = 16
"""Elements of a constant that is no weight, at most."""
DECAYS = (0.0, 0.05, 0.5)
FACTORS = {"gradient zeroed": 0.0, "gradient 0.1 % too large": 1.001, "gradient negated": -1.0}


class Scan:
    """Kinds and sites of one ONNX file; each is a change of its `Graph`.

    Args:
        model: the file, with its weights.
        draw: values for inputs that are baked in, by name.
        locate: block and module of a tensor's name.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        draw: Mapping[str, np.ndarray],
        locate: Callable[[str], Place] = place_of,
    ) -> None:
        self.graph, self.draw, self.locate = model.graph, draw, locate
        self.shapes = _shapes(model)
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.places = _places_of_nodes(self.graph, locate)
        self.read = {name for node in self.graph.node for name in node.input}

    def all(self) -> Iterator[tuple[str, str, Any, Callable[[Graph], None]]]:
        """(kind, site, place, change)."""
        yield from self.weights()
        yield from self.nodes()
        yield from self.inputs()
        yield from self.outputs()

    def weights(self) -> Iterator[Any]:
        weights = {
            name: value
            for name, value in self.constants.items()
            if value.dtype == np.float32 and value.size > FEW and value.any() and name in self.read
        }
        for kind, name, new in weight_changes(weights):
            yield kind, name, self.locate(name), partial(_set_constant, name=name, new=new)
        for name, value in self.constants.items():
            if (
                value.dtype == np.float32
                and value.size <= FEW
                and value.any()
                and name in self.read
            ):
                new = scaled(value)
                change = partial(_set_constant, name=name, new=new)
                yield "constant 5 % too large", name, self.locate(name), change
                if value.ndim == 0 and np.isclose(value, 0.01, rtol=1e-5):
                    for decay in DECAYS:
                        new = np.array(decay, np.float32)
                        change = partial(_set_constant, name=name, new=new)
                        yield f"weight decay {decay:g} for 0.01", name, (None, None), change

    def nodes(self) -> Iterator[Any]:
        for number, node in enumerate(self.graph.node):
            site, place = f"{node.op_type} {node.output[0]}", self.places[number]
            for kind, change in self._of_node(node):
                yield kind, site, place, partial(_at_node, number=number, change=change)

    def _of_node(self, node: NodeProto) -> Iterator[tuple[str, Callable[[Graph, NodeProto], None]]]:
        kind = node.op_type
        shape = self.shapes.get(node.output[0])
        kept = [n for n in node.input if n in self.shapes and self.shapes[n] == shape]
        if kind in UNARY or (kind == "Clip" and kept):
            yield f"{kind} left out", partial(_bypass, kept=node.input[0])
        elif kind in BINARY and kept and shape is not None:
            yield f"{kind} left out", partial(_bypass, kept=kept[-1])
        if kind in OTHERS:
            yield f"{kind} -> {OTHERS[kind]}", partial(_rename, kind=OTHERS[kind])
        if kind == "Shape" and node.input[0] in self.draw:
            yield "height or width baked in", partial(_bake_shape, of=self.draw[node.input[0]])
        for attribute in node.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            yield from self._of_attribute(node, attribute.name, value)

    def _of_attribute(self, node: NodeProto, name: str, value: Any) -> Iterator[Any]:
        """Softmax's axis, epsilons, AdamW's numbers, permutations that keep the shape."""
        shape, set_to = self.shapes.get(node.output[0]), partial(_attribute, name=name)
        if node.op_type == "Softmax" and name == "axis" and shape and shape[-1] == shape[-2]:
            yield "Softmax: axis", partial(set_to, value=len(shape) - 2)
        elif name == "epsilon":
            new = 1e-3 if node.op_type == "LayerNormalization" else 1e-4
            yield f"{node.op_type}: epsilon", partial(set_to, value=new)
        elif name == "perm" and node.input[0] in self.shapes:
            source, axes = self.shapes[node.input[0]], list(value)
            for one in range(len(axes)):
                for other in range(one):
                    if source[axes[one]] == source[axes[other]] != 1:
                        swapped = list(axes)
                        swapped[one], swapped[other] = swapped[other], swapped[one]
                        yield "Transpose: two axes swapped", partial(set_to, value=swapped)
                        return
        elif node.op_type == "AdamWOptimizer":
            if name == "weight_decay":
                for decay in DECAYS:
                    yield f"weight decay {decay:g} for 0.01", partial(set_to, value=decay)
            elif name in ("alpha", "beta"):
                yield f"AdamW: {name}", partial(set_to, value=1 - 2 * (1 - value))
            elif name == "correct_bias":
                yield "AdamW: bias correction dropped", partial(set_to, value=1 - value)
        elif isinstance(value, float) and value not in (0.0,) and name in ("alpha", "scale"):
            yield f"{node.op_type}: {name} 5 % too large", partial(set_to, value=value * 1.05)

    def inputs(self) -> Iterator[Any]:
        for given in self.graph.input:
            name, dims = given.name, given.type.tensor_type.shape.dim
            if (
                name in self.draw
                and name in self.read
                and all(d.HasField("dim_value") for d in dims)
            ):
                dtype = onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
                value = np.asarray(self.draw[name], dtype).reshape([d.dim_value for d in dims])
                bake = partial(_bake, name=name, value=value)
                yield "input baked in", name, self.locate(name), bake

    def outputs(self) -> Iterator[Any]:
        results = [output.name for output in self.graph.output]
        gradients = [name for name in results if name.startswith(("grad.", "new.grad."))]
        for number, name in enumerate(gradients):
            for kind, by in FACTORS.items():
                yield kind, name, self.locate(name), partial(_scale_output, name=name, by=by)
            for other in gradients[number + 1 :]:
                if self.shapes.get(other) == self.shapes.get(name) is not None:
                    swap = partial(_swap, one=name, other=other)
                    # Both are wrong, and named is the one that is further off.
                    yield "two gradients swapped", f"{name} <-> {other}", (None, None), swap
                    break
        for number, node in enumerate(self.graph.node):
            if node.op_type == "InPlaceAccumulatorV2":  # ort-training's gradients
                for kind, by in FACTORS.items():
                    change = partial(_at_node, number=number, change=partial(_accumulate, by=by))
                    yield kind, node.input[1], self.locate(node.input[1]), change


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {t.name: tuple(t.dims) for t in inferred.initializer}
    for info in (*inferred.input, *inferred.output, *inferred.value_info):
        dims = info.type.tensor_type.shape.dim
        if info.type.HasField("tensor_type") and all(d.HasField("dim_value") for d in dims):
            shapes[info.name] = tuple(d.dim_value for d in dims)
    return shapes


def _places_of_nodes(graph: onnx.GraphProto, locate: Callable[[str], Place]) -> list[Place]:
    """Of every node: that of the weights it reads; in the forward pass, where all weights directly
    before and behind it are one block's, that block.
    """
    own = [_one_place(locate(name) for name in node.input) for node in graph.node]
    maker = {name: number for number, node in enumerate(graph.node) for name in node.output}
    forward, todo = set(), [maker["loss"]] if "loss" in maker else []
    while todo:
        number = todo.pop()
        if number not in forward:
            forward.add(number)
            todo += [maker[name] for name in graph.node[number].input if name in maker]
    before: dict[int, set[str]] = {}
    behind: dict[int, set[str]] = {number: set() for number in forward}
    for number in sorted(forward):
        sources = {maker[n] for n in graph.node[number].input if n in maker}
        found = {b for s in sources for b in _block_or(own[s], before.get(s, set()))}
        before[number] = found
    for number in sorted(forward, reverse=True):
        for name in graph.node[number].input:
            if name in maker:
                behind[maker[name]] |= _block_or(own[number], behind[number])
    places = []
    for number, place in enumerate(own):
        near = before.get(number, set()) | behind.get(number, set())
        known = place[0] is None and number in forward and len(near) == 1 and before[number]
        places.append((next(iter(near)), None) if known and behind[number] else place)
    return places


def _one_place(places: Iterator[Place]) -> Place:
    found = {place for place in places if place[0]}
    return found.pop() if len(found) == 1 else (None, None)


def _block_or(place: Place, others: set[str]) -> set[str]:
    return {place[0]} if place[0] else others


def _set_constant(graph: Graph, name: str, new: np.ndarray) -> None:
    graph.change(name, lambda _: new)


def _at_node(graph: Graph, number: int, change: Callable[[Graph, NodeProto], None]) -> None:
    change(graph, graph.proto.node[number])


def _bypass(graph: Graph, node: NodeProto, kept: str) -> None:
    """Leave a node out; a result of the graph keeps its name."""
    if node.output[0] in {o.name for o in graph.proto.output}:
        del node.input[:], node.attribute[:]
        node.op_type, node.domain = "Identity", ""
        node.input.append(kept)
    else:
        graph.bypass(node, kept)


def _rename(graph: Graph, node: NodeProto, kind: str) -> None:
    node.op_type = kind


def _attribute(graph: Graph, node: NodeProto, name: str, value: Any) -> None:
    set_attribute(node, name, value)


def _bake(graph: Graph, name: str, value: np.ndarray) -> None:
    graph.replace(name, graph.constant(value, value.dtype))


def _bake_shape(graph: Graph, node: NodeProto, of: np.ndarray) -> None:
    bounds = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shape = np.shape(of)[bounds.get("start", 0) : bounds.get("end")]
    graph.replace(node.output[0], graph.constant(shape, np.int64))


def _accumulate(graph: Graph, node: NodeProto, by: float) -> None:
    node.input[1] = graph.insert("Mul", [node.input[1], graph.constant(by)], node)


def _scale_output(graph: Graph, name: str, by: float) -> None:
    graph.output(name, "Mul", graph.constant(by))


def _swap(graph: Graph, one: str, other: str) -> None:
    graph.swap(one, other)


def load_graph(bundle: Path, file: str) -> onnx.ModelProto:
    """An ONNX file with its weights in it."""
    model = onnx.load(bundle / file)
    external_data_helper.convert_model_from_external_data(model)
    return model


def _plant_in_graph(bundle: Path, file: str, change: Callable[[Graph], None]) -> None:
    model = load_graph(bundle, file)
    change(Graph(model.graph))
    onnx.save(model, bundle / file)


def _baked(bundle: Bundle, bank_draw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of one draw for every kind of input."""
    adapter = with_random_b(bundle.adapter())
    rng = np.random.default_rng(1)
    gradients = {f"grad.{n}": rng.normal(0, 0.1, v.shape) for n, v in adapter.items()}
    moments = {f"exp_avg.{n}": rng.normal(0, 0.1, v.shape) for n, v in adapter.items()}
    second = {f"exp_avg_sq.{n}": rng.uniform(0, 0.1, v.shape) for n, v in adapter.items()}
    flowing = {
        f"grad.{n}": rng.normal(0, 1e-3, v.shape)
        for n, v in bank_draw.items()
        if n.startswith("entry")
    }
    side = bundle.manifest.plan["s_max"]
    others = {
        "lr": np.array(bundle.manifest.optimizer.lr),
        "learning_rate": np.array(bundle.manifest.optimizer.lr),
        "step": np.array(0.0),
        "sigma": np.array([0.5]),
        "uv": np.array([0.5, 0.5]),
        "image": np.zeros((1, 3, side, side)),
    }
    return {**bank_draw, **adapter, **gradients, **moments, **second, **flowing, **others}


# ---------------------------------------------------------------- a bundle


def sites(bundle: Bundle, family: str, draw: Mapping[str, np.ndarray]) -> list[Mutant]:
    """Every mutant of a bundle.

    Args:
        bundle: clean.
        family: of it, as it shall be reported.
        draw: one of its bank, for inputs that are baked in.
    """
    made = [*_of_claims(bundle, family)]
    baked = _baked(bundle, draw)
    for target in bundle.manifest.targets:
        for layout in bundle.layouts(target):
            blank = Mutant("", family, target, layout, "", "", None, None, print)
            if target == "executorch":
                made += _of_programs(bundle, blank)
            else:
                made += _of_frozen(bundle, blank)
                for file in _graphs(bundle, target, layout):
                    made += _of_graph(bundle, blank, file, baked)
    return made


def _graphs(bundle: Bundle, target: str, layout: str) -> list[str]:
    if target == "ort-training":
        return [TRAINING_MODEL, OPTIMIZER_MODEL, SAMPLER]
    if layout != STREAMED:
        return [STEP_FILES[layout], OPTIMIZER, SAMPLER]
    blocks = sorted(path.name for path in (bundle.folder / target).glob("block.*.onnx"))
    return [*blocks, HEAD, OPTIMIZER, SAMPLER]


def _of_graph(
    bundle: Bundle, blank: Mutant, file: str, baked: Mapping[str, np.ndarray]
) -> Iterator[Mutant]:
    path = f"{blank.target}/{file}"
    locate = place_of
    if file.startswith("block."):
        facts = bundle.manifest.targets[blank.target]["streamed"]["blocks"]
        blocks = [b["name"] for b in facts if f"block.{b['kind']}." in file]
        only = blocks[0] if len(blocks) == 1 else None
        locate = partial(_place_in_block, block=only)
    scan = Scan(load_graph(bundle.folder, path), baked, locate)
    for kind, site, (block, module), change in scan.all():
        plant = partial(_plant_in_graph, file=path, change=change)
        yield replace(
            blank, kind=kind, file=path, site=site, block=block, module=module, plant=plant
        )


def _of_frozen(bundle: Bundle, blank: Mutant) -> Iterator[Mutant]:
    if blank.target == "onnx" and blank.layout != STREAMED:
        return  # the graphs' own scan finds the same weights
    path = f"{blank.target}/frozen.safetensors"
    tensors = TensorFile(bundle.folder / path).read()
    for kind, name, new in weight_changes({n: v for n, v in tensors.items() if v.size > FEW}):
        block, module = place_of(name)
        plant = partial(_store_tensor, file=path, name=name, value=new)
        yield replace(
            blank, kind=kind, file=path, site=name, block=block, module=module, plant=plant
        )


def _place_in_block(name: str, block: str | None) -> Place:
    """In the graph of a block: all of it is the block's, if no other block shares the graph."""
    return block, module_of(name)


SCALARS = (0.9, 0.1, 0.999, 0.001, 0.01, 1e-6)
"""Of an optimizer's program: betas and one minus them, decay, eps."""


def _of_programs(bundle: Bundle, blank: Mutant) -> Iterator[Mutant]:
    """Bytes of the programs: weights, where their values stand once in the file, and numbers."""
    raw = (bundle.folder / "executorch" / "train.pte").read_bytes()
    weights = TensorFile(bundle.folder / "onnx" / "frozen.safetensors").read()
    once = {n: v for n, v in weights.items() if v.size > 3 and raw.count(v.tobytes()) == 1}
    for kind, name, new in weight_changes(once):
        block, module = place_of(name)
        file = "executorch/train.pte"
        plant = partial(
            _store_bytes,
            file=file,
            offset=raw.index(once[name].tobytes()),
            new=new.astype(np.float32).tobytes(),
        )
        yield replace(
            blank, kind=kind, file=file, site=name, block=block, module=module, plant=plant
        )
    for name in ("optimizer.pte", "patch_sampler.pte", "train.pte"):
        yield from _of_program(bundle, replace(blank, file=f"executorch/{name}"))


def _of_program(bundle: Bundle, blank: Mutant) -> Iterator[Mutant]:
    raw = (bundle.folder / blank.file).read_bytes()
    if blank.file.endswith("optimizer.pte"):
        for value in SCALARS:
            stored = np.float32(value).tobytes()
            changes = {"constant 5 % too large": value * 1.05}
            if value == 0.01:
                changes |= {f"weight decay {d:g} for 0.01": d for d in DECAYS}
            for kind, new in changes.items():
                if raw.count(stored) == 1:
                    plant = partial(
                        _store_bytes,
                        file=blank.file,
                        offset=raw.index(stored),
                        new=np.float32(new).tobytes(),
                    )
                    yield replace(blank, kind=kind, site=f"{value:g}", plant=plant)
    for have, new in (("add", "sub"), ("sub", "add"), ("mul", "div"), ("div", "mul")):
        stored = f"aten::{have}\0".encode()
        if raw.count(stored) == 1:
            plant = partial(
                _store_bytes,
                file=blank.file,
                offset=raw.index(stored),
                new=f"aten::{new}\0".encode(),
            )
            yield replace(blank, kind="operator exchanged", site=f"{have} -> {new}", plant=plant)


# ---------------------------------------------------------------- manifest and adapter


def _of_claims(bundle: Bundle, family: str) -> Iterator[Mutant]:
    blank = Mutant("", family, CLAIMS, FUSED, "manifest.json", "", None, None, print)
    manifest = bundle.manifest
    for name in asdict(manifest.optimizer):
        plant = partial(_claim_optimizer, name=name)
        yield replace(blank, kind="manifest: optimizer", site=name, plant=plant)
    for name, value in manifest.plan.items():
        new = _other(value)
        if new is not None:
            plant = partial(_claim_plan, name=name, value=new)
            yield replace(blank, kind="manifest: plan", site=name, plant=plant)
    for number, spec in enumerate(manifest.tensors):
        block, module = place_of(spec.name)
        at = replace(blank, site=spec.name, block=block, module=module)
        yield replace(at, kind="manifest: shape", plant=partial(_claim_shape, number=number))
        if number:
            yield replace(at, kind="manifest: order", plant=partial(_claim_order, number=number))
    tensors, rank, alpha = read_adapter(bundle.folder / ADAPTER)
    at = replace(blank, file=ADAPTER)
    zero = {n: np.zeros_like(v) for n, v in tensors.items()}
    rng = np.random.default_rng(11)
    seed = {n: rng.permuted(v.ravel()).reshape(v.shape) for n, v in tensors.items()}
    trained = {n: (v + rng.normal(0, 1e-3, v.shape)).astype(np.float32) for n, v in tensors.items()}
    for kind, new in (("all zero", zero), ("another seed", seed), ("trained", trained)):
        plant = partial(_claim_adapter, tensors=new, rank=rank, alpha=alpha)
        yield replace(at, kind=f"adapter: {kind}", site="all", plant=plant)
    for kind, header in (("alpha", (rank, alpha * 2)), ("rank", (rank + 1, alpha))):
        plant = partial(_claim_adapter, tensors=tensors, rank=header[0], alpha=header[1])
        yield replace(at, kind=f"adapter: {kind}", site="header", plant=plant)
    for name, value in tensors.items():
        block, module = place_of(name)
        new = {**tensors, name: (value + np.float32(0.01)).astype(np.float32)}
        plant = partial(_claim_adapter, tensors=new, rank=rank, alpha=alpha)
        yield replace(
            at, kind="adapter: one tensor", site=name, block=block, module=module, plant=plant
        )


def _other(value: Any) -> Any:
    """Another value of the same kind; None where there is none that is simple."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 1.05 or 0.5
    return None


def _update(bundle: Path, **changes: Any) -> None:
    write_manifest(bundle, open_bundle(bundle).manifest.model_copy(update=changes))


def _claim_optimizer(bundle: Path, name: str) -> None:
    optimizer = open_bundle(bundle).manifest.optimizer
    _update(bundle, optimizer=replace(optimizer, **{name: getattr(optimizer, name) * 0.95}))


def _claim_plan(bundle: Path, name: str, value: Any) -> None:
    _update(bundle, plan={**open_bundle(bundle).manifest.plan, name: value})


def _claim_shape(bundle: Path, number: int) -> None:
    tensors = list(open_bundle(bundle).manifest.tensors)
    shape = tensors[number].shape
    new = (*shape[:-1], shape[-1] + 1) if shape else (1,)
    tensors[number] = tensors[number].model_copy(update={"shape": new})
    _update(bundle, tensors=tensors)


def _claim_order(bundle: Path, number: int) -> None:
    tensors = list(open_bundle(bundle).manifest.tensors)
    tensors[number - 1], tensors[number] = tensors[number], tensors[number - 1]
    _update(bundle, tensors=tensors)


def _claim_adapter(bundle: Path, tensors: dict[str, np.ndarray], rank: int, alpha: float) -> None:
    write_adapter(bundle / ADAPTER, tensors, rank, alpha)
