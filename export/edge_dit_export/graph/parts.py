"""What is before and after a transformer's blocks, and its autoencoder, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from edge_dit.contract.loop import (
    DEVIATION,
    LATENTS,
    MEAN,
    PIXELS,
    PREDICTION,
    PROMPT,
    TIMESTEP,
)
from edge_dit.contract.names import AT_HEAD, COND, ENTRY, STATE, read_in
from edge_dit.models.families.family import Family, Grid, Prompt
from edge_dit.models.subgraph import conditioning_of
from edge_dit_export.graph.fold_constants import fold_constants
from edge_dit_export.graph.trace import TracedStep, trace

Tensors = dict[str, Tensor]
LARGE = 1024
"""Larger constants, in bytes, become inputs as weights are."""


@dataclass(frozen=True)
class Part:
    """A piece of a model as a function of tensors.

    Attributes:
        family: of the model.
        module: whose parameters and buffers the piece reads.
        inputs: an example of every input.
        run: what it computes, by name; reads the parameters of the module.
        fixed: whether it has inputs of its own that are always the same, which become constants.
    """

    family: Family
    module: nn.Module
    inputs: Tensors
    run: Callable[[Tensors], Tensors]
    fixed: bool = False

    def trace(self) -> tuple[TracedStep, Tensors, Tensors]:
        """The traced piece; those of its inputs that are parameters of the module, by their names
        there; and those that are constants, by number.
        """
        own = {name: p.detach() for name, p in self.module.named_parameters() if not p.is_meta}
        if not self.fixed:
            own |= {name: b for name, b in self.module.named_buffers() if not b.is_meta}
        called = _Called(self.module, self.run)

        def function(tensors: Tensors) -> tuple[Tensor, ...]:
            state = {f"module.{name}": tensors[name] for name in own}
            with _Plain():
                found = functional_call(called, state, ({n: tensors[n] for n in self.inputs},))
            outputs[:] = list(found)
            return tuple(found.values())

        outputs: list[str] = []
        with torch.no_grad():
            module = trace(function, {**self.inputs, **own}, self.family, compute=self.fixed)
        fold_constants(module)
        constants = _to_inputs(module)
        return TracedStep(module, {**self.inputs, **own, **constants}, outputs), own, constants


class _Plain(TorchFunctionMode):
    """While a piece is traced, writes two functions in forms that take little memory.

    torch would multiply a linear layer's weight by each row of a picture on its own, with a copy of
    the weight for each; and would gather every pixel of an enlarged picture by its index.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is nn.functional.linear and not options and args[0].ndim > 2:
            rows = func(args[0].reshape(-1, args[0].shape[-1]), *args[1:])
            return rows.reshape(*args[0].shape[:-1], -1)
        if func is nn.functional.interpolate and len(args) == 1 and args[0].ndim == 4:
            repeats = _repeats(**options)
            if repeats:
                return args[0].repeat_interleave(repeats, 2).repeat_interleave(repeats, 3)
        return func(*args, **options)


def _repeats(
    scale_factor: Any = None, mode: str = "nearest", size: Any = None, **_: Any
) -> int | None:
    """How often `interpolate` repeats each pixel along either side; None if it does not."""
    factors = set(scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor])
    whole = len(factors) == 1 and size is None and mode in ("nearest", "nearest-exact")
    factor = factors.pop() if whole else None
    return int(factor) if factor is not None and factor == int(factor) else None


class _Called(nn.Module):
    """Calls a function while `functional_call` has replaced a module's parameters."""

    def __init__(self, module: nn.Module, run: Callable[[Tensors], Tensors]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, tensors: Tensors) -> Tensors:
        return self.run(tensors)


def _to_inputs(module: fx.GraphModule) -> Tensors:
    """Turn large constants into inputs after all others, in place; their values by name."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    found: dict[str, Tensor] = {}
    inputs: dict[str, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if value.dtype != torch.float32 or value.nbytes <= LARGE:
            continue
        target = str(node.target)
        if target not in inputs:
            name = f"constant.{len(found)}"
            with graph.inserting_after(last):
                last = inputs[target] = graph.placeholder(name.replace(".", "_"))
            last.meta = {**node.meta, "val": value}
            found[name] = value.detach()
        node.replace_all_uses_with(inputs[target])
        graph.erase_node(node)
    _copy_outputs(graph)
    module.recompile()
    return found


def _copy_outputs(graph: fx.Graph) -> None:
    """Make no input or constant a result itself: ONNX would call both by one name."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = []
    for node in output.args[0]:  # type: ignore[union-attr]
        if node.op in ("placeholder", "get_attr"):
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = dict(node.meta)
            node = copy
        results.append(node)
    output.args = (tuple(results),)


def begin_part(family: Family, model: Any, latents: Tensor, prompt: Prompt, grid: Grid) -> Part:
    """Latents, timestep [1] and an encoded prompt -> state and conditioning, as banks name them.

    Args:
        family: of the model.
        model: the transformer; its blocks may lie on the meta device.
        latents, prompt: examples.
        grid: token rows and columns.
    """

    def run(tensors: Tensors) -> Tensors:
        given = {name: tensors[PROMPT + name] for name in prompt}
        inputs = family.inputs(model, tensors[LATENTS], 1.0, given, grid)
        state, cond = family.begin(model, {**inputs, "timestep": family.handed(tensors[TIMESTEP])})
        after = zip(STATE, state, strict=True)
        return {
            **{name: value for name, value in after if value is not None},
            **{COND + name: value for name, value in cond.items()},
        }

    inputs = {LATENTS: latents, TIMESTEP: torch.ones(1)}
    inputs |= {PROMPT + name: value for name, value in prompt.items()}
    return Part(family, model, inputs, run, fixed=True)


def predict_part(family: Family, model: Any, batch: Mapping[str, Tensor], grid: Grid) -> Part:
    """The last state and conditioning -> what the model predicts, shaped as latents.

    Args:
        family: of the model.
        model: the transformer; its blocks may lie on the meta device.
        batch: results of `begin_part`, as examples.
        grid: token rows and columns.
    """

    def run(tensors: Tensors) -> Tensors:
        found = family.head(model, tensors[ENTRY], conditioning_of(tensors), grid)
        return {PREDICTION: family.learned(found)}

    cond = read_in([AT_HEAD], conditioning_of(batch))
    inputs = {ENTRY: batch[ENTRY], **{COND + name: value for name, value in cond.items()}}
    return Part(family, model, inputs, run)


def encoder_part(family: Family, vae: Any, tile: int) -> Part:
    """Pixels [1, 3, tile, tile] -> mean and, where it is sampled, deviation of their latents."""

    def run(tensors: Tensors) -> Tensors:
        mean, deviation = family.moments(vae, tensors[PIXELS])
        return {MEAN: mean} if deviation is None else {MEAN: mean, DEVIATION: deviation}

    return Part(family, vae, {PIXELS: torch.zeros(1, 3, tile, tile)}, run)


def decoder_part(family: Family, vae: Any, tile: int) -> Part:
    """Latents of the autoencoder -> pixels [1, 3, tile, tile]."""

    def run(tensors: Tensors) -> Tensors:
        return {PIXELS: family.pixels(vae, tensors[LATENTS])}

    facts = family.latents(vae)
    side = tile // facts.factor
    return Part(family, vae, {LATENTS: torch.zeros(1, facts.channels, side, side)}, run)
