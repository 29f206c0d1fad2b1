"""Small deterministic models for tests: real diffusers classes, fixed non-trivial weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from edge_dit.contract.names import STORED, Tail
from edge_dit.models.families.sana import FAMILY
from edge_dit.models.subgraph import TrainableSubgraph, add_lora, as_batch, lora_modules

JOB = """
[model]
path = "model"

[data]
images = "images"
prompt = "a sks toy"

[plan]
head_skip = 1
tail_skip = 1

[train]
resolution = 64
patch = 32
rank = 4
alpha = 8
lora_targets = ["attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ff.conv_inverted", "ff.conv_point"]
lr = 1e-3
steps = 12
draws = 10
seed = 3

[export]
targets = ["onnx", "ort-training", "executorch"]
"""


def job(prompt: str = "a sks toy", export: str = "", **train: object) -> str:
    """A job of a pipeline in "model" and pictures in "images": all but the first and the last block
    train.

    Args:
        prompt: of pictures without a caption.
        export: lines of [export].
        train: values of [train] by key.
    """
    keys = "\n".join(f"{key} = {value}" for key, value in train.items())
    return f"""
[model]
path = "model"
[data]
images = "images"
prompt = "{prompt}"
[plan]
head_skip = 1
tail_skip = 1
[train]
{keys}
[export]
{export}
"""


GRID = (4, 4)
"""Token grid of a test patch."""
TEXT = 10
"""Text tokens, of which the last three are padding."""


TARGETS = (*FAMILY.lora_targets, "attn1.to_out.0", "ff.conv_inverted", "ff.conv_point")
"""LoRA on linear layers and on 1x1 convolutions."""


def transformer(
    layers: int = 4, in_channels: int = 4, caption_channels: int = 24
) -> SanaTransformer2DModel:
    """A SANA transformer of width 32 with ``layers`` blocks."""
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=in_channels,
        out_channels=in_channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=caption_channels,
        sample_size=8,
    ).eval()


def subgraph(
    head_skip: int = 1,
    tail_skip: int = 1,
    layers: int = 4,
    rank: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] = TARGETS,
    tail: Tail = STORED,
) -> tuple[TrainableSubgraph, dict[str, Tensor]]:
    """A sub-graph with non-zero LoRA B, and one draw for it."""
    model = transformer(layers)
    trained = range(head_skip, layers - tail_skip)
    add_lora(model, lora_modules(FAMILY, model, trained, targets), rank, alpha, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    mask = torch.ones(1, TEXT)
    mask[:, -3:] = 0
    latents = torch.randn(1, 4, *GRID, generator=generator)
    embeds = torch.randn(1, TEXT, 24, generator=generator)
    prompt = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    entry, cond = FAMILY.begin(model, FAMILY.inputs(model, latents, 500.0, prompt, GRID))
    residual = torch.randn(entry.image.shape, generator=generator)
    target = torch.randn(latents.shape, generator=generator)
    batch = as_batch(entry, residual if tail == STORED else None, cond, target)
    return TrainableSubgraph(model, FAMILY, trained, GRID, tail), batch


def eager(sub: TrainableSubgraph, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients by torch autograd, named like a train step's outputs."""
    sub.zero_grad()
    loss = sub(batch)
    loss.backward()
    gradients = {f"grad.{name}": p.grad.clone() for name, p in sub.lora_parameters().items()}
    return {"loss": loss.detach(), **gradients}


@cache
def traced():
    """The default sub-graph, its draw and its traced step. Passes edit a deep copy of it."""
    from edge_dit_export.graph.train_step import trace_train_step

    sub, batch = subgraph()
    return sub, batch, trace_train_step(sub, batch)


def assert_close(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of its largest value; the message names the worst one."""
    for name, want in expected.items():
        error = (want - found[name]).abs()
        limit = tolerance * want.abs().max()
        assert error.max() <= limit, (
            f"{name}: max difference {error.max():.3e}, mean {error.mean():.3e}, "
            f"tolerance {limit:.3e}"
        )


def write_job(folder: Path, *changes: tuple[str, str]) -> Path:
    """`JOB` with some of its text replaced, as ``folder/other.toml``."""
    text = JOB
    for change in changes:
        text = text.replace(*change)
    path = folder / "other.toml"
    path.write_text(text)
    return path
