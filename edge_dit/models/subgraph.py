"""What trains on the device: trained blocks, head and loss (docs/method.md, Eq. 3).

    f'(last) = trained(entry) + tail residual        loss = weight * mean((head(f') - target)^2)

Everything upstream of the first trained block is frozen, so the stored entry state is exact. Where
the tail is `STORED`, its residual is the frozen model's, not the adapted one's (Eq. 3). `FRESH` and
`THROUGH` run the tail blocks, which carry no LoRA, on the adapted state:

    fresh      f'(last) = t + constant(tail(t) - t)        through   f'(last) = tail(t)
               with t = trained(entry)

Further runs of blocks may be skipped between trained ones. Each such run has a residual of its own,
which is added in its place. An inner residual also covers text tokens, because later blocks read
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_dit.contract.adapter import PREFIX
from edge_dit.contract.names import (
    AT_HEAD,
    COND,
    ENTRY,
    ENTRY_TEXT,
    FRESH,
    STORED,
    TAIL_RESIDUAL,
    TARGET,
    THROUGH,
    WEIGHT,
    WEIGHT_MASK,
    T,
    Tail,
    read_in,
    residual_names,
)
from edge_dit.contract.split import inner_runs
from edge_dit.models.families.family import Family, Grid, State


def difference(after: State, before: State) -> State:
    """The residual of a run of blocks: what it adds to the state (Eq. 3)."""
    if after.text is None or before.text is None:
        return State(after.image - before.image)
    return State(after.image - before.image, after.text - before.text)


def can_carry_lora(module: nn.Module) -> bool:
    """Whether LoRA may sit on a module: linear layers and 1x1 convolutions."""
    one = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or one


def frozen_layers(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of blocks whose frozen weight is a matrix, each once: linear layers and 1x1
    convolutions, those within LoRA too.
    """
    found = {
        id(module): module
        for block in blocks
        for module in block.modules()
        if can_carry_lora(module) and not module.weight.requires_grad  # type: ignore[union-attr]
    }
    return list(found.values())


def lora_modules(
    family: Family,
    model: nn.Module,
    blocks: Iterable[int],
    targets: Iterable[str],
    tail: Tail = STORED,
) -> list[str]:
    """Full names, within the model, of the modules in ``blocks`` that carry LoRA.

    Args:
        family: of the model.
        model: the transformer; its blocks may lie on the meta device.
        blocks: numbers of the trained blocks, in order.
        targets: modules within a block. Those that a block does not have are left out there. In the
            last trained block `Family.text_output` is left out too, where no gradient comes from
            it: unless the tail is `THROUGH`, whose blocks read it.
        tail: what takes the place of the blocks after the last one in ``blocks``.
    """
    everything = list(family.blocks(model).items())
    chosen, wanted = list(blocks), list(targets)
    read = tail == THROUGH and chosen[-1] + 1 < len(everything)
    modules = []
    for number in chosen:
        name, block = everything[number]
        inside = dict(block.named_modules())
        idle = family.text_output if number == chosen[-1] and not read else ()
        # FLUX.2 calls a linear layer of one kind of blocks "attn.to_out", a list in the other kind.
        own = [t for t in wanted if getattr(inside.get(t), "weight", None) is not None]
        modules += [f"{name}.{t}" for t in own if t not in idle]
    return modules


def add_lora(model: nn.Module, modules: list[str], rank: int, alpha: float, seed: int) -> None:
    """Put a PEFT LoRA on ``modules`` of a diffusers model, in place.

    W' = W + alpha / rank * B A (arXiv 2106.09685). A is drawn from N(0, 1 / rank) (PEFT's
    "gaussian"), B is zero. All other parameters are frozen.

    Args:
        model: the transformer.
        modules: full names, from `lora_modules`.
        rank: of B A.
        alpha: scale of the LoRA.
        seed: of A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
        config = LoraConfig(**options, init_lora_weights="gaussian")
        # Not model.add_adapter: PixArt's transformer has none.
        inject_adapter_in_model(config, model)


def remove_lora(model: nn.Module) -> None:
    """Remove the LoRA that `add_lora` added, trained or not; the base weights stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):  # PEFT takes a model with it for one that has adapters
        del model.peft_config


def lora_name(parameter: str) -> str:
    """Diffusers' name of a PEFT parameter: "...to_q.lora_A.default.weight" ->
    "transformer....to_q.lora_A.weight".
    """
    return PREFIX + parameter.replace(".default.weight", ".weight")


def as_batch(
    entry: State,
    tail_residual: Tensor | None,
    cond: Mapping[str, Tensor],
    target: Tensor,
    weight: float | Tensor | None = None,
    inner: Mapping[int, State] | None = None,
) -> dict[str, Tensor]:
    """A draw's tensors under the names that banks and exported graphs use.

    Args:
        entry: state that enters the first trained block.
        tail_residual: image tokens after the last block minus those after the last trained block,
            [1, N, D]; None where the tail is not `STORED`.
        cond: conditioning.
        target: what the model should predict.
        weight: of the draw's loss, where draws are weighed; or of each token's, where they have
            masks: [1, N, 1], or [1, 1, h, w] of latents.
        inner: first block of each run skipped between trained blocks -> its residual.
    """
    batch = {ENTRY: entry.image}
    if entry.text is not None:
        batch[ENTRY_TEXT] = entry.text
    for first, residual in (inner or {}).items():
        named = zip(residual_names(first), residual, strict=True)
        batch |= {name: value for name, value in named if value is not None}
    batch |= {COND + name: value for name, value in cond.items()}
    if tail_residual is not None:
        batch[TAIL_RESIDUAL] = tail_residual
    batch[TARGET] = target
    if isinstance(weight, Tensor):
        batch[WEIGHT_MASK] = weight
    elif weight is not None:
        batch[WEIGHT] = torch.tensor([weight])
    # A bank stores contiguous rows of float32. ExecuTorch refuses them if it traced other strides.
    return {name: value.float().contiguous() for name, value in batch.items()}


class TrainableSubgraph(nn.Module):
    """Trained blocks with LoRA, the tail blocks unless their residual is stored, head and loss.

    The blocks and the head are the model's own submodules, not copies. Parameters keep their names
    in the model, so `lora_parameters` gives diffusers' LoRA names.

    Args:
        model: a diffusers transformer that already carries LoRA (`add_lora`). Blocks that do not
            run may lie on the meta device.
        family: of the model.
        trained: numbers of the trained blocks, ascending.
        grid: token rows and columns of a patch.
        tail: what takes the place of the blocks after the last trained one.

    Attributes:
        order: names of the trained blocks.
        after: names of the tail blocks that run; none where their residual is stored.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        trained: Sequence[int],
        grid: Grid,
        tail: Tail = STORED,
    ) -> None:
        super().__init__()
        self.family = family
        self.grid = grid
        self.tail: Tail = tail
        everything = list(family.blocks(model).items())
        self.order = [everything[number][0] for number in trained]
        last = [name for name, _ in everything[trained[-1] + 1 :]]
        self.after = [] if tail == STORED else last
        self.jumps = {everything[k][0]: first for k, first in inner_runs(trained).items()}
        # Keyed by the block's number in its container, so that names stay the model's.
        for name, block in everything:
            if name in (*self.order, *self.after):
                container, number = name.split(".")
                if not hasattr(self, container):
                    self.add_module(container, nn.ModuleDict())
                getattr(self, container)[number] = block
        for name in self.family.head_modules:
            setattr(self, name, getattr(model, name))
        self.config = model.config

    def blocks(self) -> list[nn.Module]:
        """The trained blocks and those of the tail that run, in order."""
        return [self.get_submodule(name) for name in (*self.order, *self.after)]

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by diffusers LoRA name, in a stable order."""
        return {
            lora_name(name): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def reads(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the blocks that run, and the head, read of a model's conditioning."""
        return read_in((*self.order, *self.after, AT_HEAD), cond)

    def differentiated(self) -> list[str]:
        """Names of the blocks that a gradient goes back through, in order of execution."""
        return [*self.order, *(self.after if self.tail == THROUGH else [])]

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """The adapted model's prediction for one draw, shaped like the stock forward's output.

        Args:
            batch: as `forward` takes it; target and weight are not read.
        """
        cond = conditioning_of(batch)
        state = State(batch[ENTRY], batch.get(ENTRY_TEXT))
        for name in self.order:
            state = self.run(name, self.arrive(name, state, batch), cond)
        return self.family.head(self, self.last_image(state, cond, batch), cond, self.grid)

    def run(self, name: str, state: State, cond: Mapping[str, Tensor]) -> State:
        """The state after one of the blocks that run."""
        return self.family.run_block(name, self.get_submodule(name), state, cond, self.grid)

    def last_image(
        self, state: State, cond: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The image tokens that the head reads, [1, N, D].

        Args:
            state: after the last trained block.
            cond: conditioning.
            batch: holds the tail's residual, where that is stored.
        """
        if self.tail == STORED:
            return state.image + batch[TAIL_RESIDUAL]
        last = state
        if self.tail == FRESH:
            text = None if state.text is None else state.text.detach()
            last = State(state.image.detach(), text)
        for name in self.after:
            last = self.run(name, last, cond)
        if self.tail == FRESH:
            return state.image + (last.image - state.image).detach()
        return last.image

    def arrive(self, block: str, state: State, batch: Mapping[str, Tensor]) -> State:
        """The state that enters a trained block, after any run skipped before it.

        Args:
            block: name of the trained block.
            state: after the trained block before it, or the entry state.
            batch: holds the residuals.
        """
        if block not in self.jumps:
            return state
        image, text = residual_names(self.jumps[block])
        moved = None if state.text is None else state.text + batch[text]
        return State(state.image + batch[image], moved)

    def loss(self, prediction: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a prediction against the draw's target, a scalar."""
        learned = self.family.learned(prediction)
        if WEIGHT_MASK in batch:
            off = learned - batch[TARGET]
            return (off * off * batch[WEIGHT_MASK]).mean()
        loss = torch.nn.functional.mse_loss(learned, batch[TARGET])
        return loss * batch[WEIGHT].squeeze() if WEIGHT in batch else loss

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of one draw, a scalar.

        Args:
            batch: float32 tensors from `as_batch`: "entry" [1, N, D], "target" and the family's
                "cond.<name>". In joint-attention families also "entry_text" [1, L, D], where the
                tail is stored "tail_residual" [1, N, D], where draws are weighed "weight" [1] or
                "weight_mask" [1, N, 1] or [1, 1, h, w], and
                for every run skipped between trained blocks its `residual_names`.
        """
        return self.loss(self.predict(batch), batch)


def conditioning_of(batch: Mapping[str, T]) -> dict[str, T]:
    """The conditioning among what goes by a draw's names, under the family's."""
    return {k.removeprefix(COND): v for k, v in batch.items() if k.startswith(COND)}
