"""The part of a model that trains on the device: trained blocks, head and loss (PAPER sec. 3.2).

    f'(last) = trained(entry) + tail residual        loss = weight * mean((head(f') - target)^2)

Everything upstream of the first trained block is frozen, so the stored entry state is exact; the
tail residual is the frozen model's, not the adapted one's (Eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edge_dit.adapter import PREFIX
from edge_dit.families import family_module


def lora_modules(family: Any, blocks: Iterable[int], targets: Iterable[str]) -> list[str]:
    """Full names, within the model, of ``targets`` in ``blocks``."""
    targets = list(targets)
    return [f"{family.BLOCKS}.{index}.{target}" for index in blocks for target in targets]


def add_lora(model: nn.Module, modules: list[str], rank: int, alpha: float, seed: int) -> None:
    """Put a PEFT LoRA on ``modules`` of a diffusers model, in place.

    A is drawn from N(0, 1 / rank) (PEFT's "gaussian"), B is zero; W' = W + alpha / rank * B A
    (arXiv 2106.09685). All other parameters are frozen.
    """
    from peft import LoraConfig

    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
        config = LoraConfig(**options, init_lora_weights="gaussian")
        model.add_adapter(config)  # type: ignore[operator]


def lora_name(parameter: str) -> str:
    """Diffusers' name of a PEFT parameter: "...to_q.lora_A.default.weight" ->
    "transformer....to_q.lora_A.weight".
    """
    return PREFIX + parameter.replace(".default.weight", ".weight")


def as_batch(captured: Any, target: Tensor) -> dict[str, Tensor]:
    """A draw's tensors by the names that bank and exported graphs use.

    Args:
        captured: a family's Captured.
        target: velocity to predict, [1, C, h, w].
    """
    batch = {
        "entry": captured.entry,
        **{f"cond.{name}": value for name, value in captured.cond.items()},
        "tail_residual": captured.tail_residual,
        "target": target,
    }
    # A bank stores rows; graphs traced with other strides would take no such tensor (ExecuTorch).
    return {name: value.contiguous() for name, value in batch.items()}


class TrainableSubgraph(nn.Module):
    """Trained blocks with LoRA, head and flow-matching loss.

    The blocks and the head are the model's own submodules, not copies. Parameters keep the model's
    names, so `lora_parameters` gives diffusers' LoRA names.

    Args:
        model: a diffusers transformer that already carries LoRA (`add_lora`).
        family: name of the family.
        head_skip: leading blocks left out (n).
        tail_skip: trailing blocks left out (m).
        size: token grid (rows, columns) of a patch.
    """

    def __init__(
        self, model: nn.Module, family: str, head_skip: int, tail_skip: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.family = family_module(family)
        self.size = size
        layers = self.family.blocks(model)
        trained = range(head_skip, len(layers) - tail_skip)
        # Keyed by the block's number in the model, so that names stay the model's.
        self.transformer_blocks = nn.ModuleDict({str(i): layers[i] for i in trained})
        self.norm_out = model.norm_out
        self.proj_out = model.proj_out
        self.scale_shift_table = model.scale_shift_table
        self.config = model.config

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by diffusers LoRA name, in a stable order."""
        return {
            lora_name(name): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """The velocity [1, C, h, w] that the adapted middle predicts for one draw."""
        cond = {k.removeprefix("cond."): v for k, v in batch.items() if k.startswith("cond.")}
        h = batch["entry"]
        for block in self.transformer_blocks.values():
            h = self.family.run_block(block, h, cond, self.size)
        return self.family.head(self, h + batch["tail_residual"], cond, self.size)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of one draw, a scalar.

        Args:
            batch: "entry" and "tail_residual" [1, N, D], "target" [1, C, h, w], and the family's
                "cond.<name>" tensors; all float32.
        """
        return torch.nn.functional.mse_loss(self.predict(batch), batch["target"])
