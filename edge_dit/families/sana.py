"""SANA (arXiv 2410.10629) as diffusers 0.42 implements it: SanaTransformer2DModel.

One stream of image tokens; text enters by cross-attention (attn2); linear self-attention (attn1);
a convolutional feed-forward that needs the latent's height and width.

Conditioning tensors, shared by all blocks (D = width, L = text tokens):

    encoder_hidden_states   [1, L, D]   projected and normed caption
    encoder_attention_mask  [1, 1, L]   0 for a token, -10000 for padding
    timestep                [1, 6 D]    modulation of the blocks
    embedded_timestep       [1, D]      modulation of the head

Padding has exactly no weight (exp(-10000) is 0 in float32), so text is cut to the longest prompt of
a job without changing any value.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_dit.errors import BadInput
from edge_dit.pipeline import quiet

NAME = "sana"
PIPELINES = ("SanaPipeline",)
TRANSFORMER = "SanaTransformer2DModel"
LORA_TARGETS = tuple(
    f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ("to_q", "to_k", "to_v")
)
"""LoRA targets of diffusers' train_dreambooth_lora_sana.py, spelled out within a block."""
BLOCKS = "transformer_blocks"
"""Name of the block container in the model; LoRA names start with it."""
MAX_TEXT_TOKENS = 300
"""SanaPipeline's max_sequence_length."""


PROMPT_COND = ("encoder_hidden_states", "encoder_attention_mask")
"""Conditioning that depends on the prompt alone: a bank stores it once per prompt."""


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a checkpoint: number of blocks, and pixels per token side."""

    layers: int
    multiple: int


@dataclass(frozen=True)
class Captured:
    """What one forward pass of the frozen model leaves for training (PAPER sec. 3.2).

    Attributes:
        entry: hidden state entering the first trained block, [1, N, D].
        tail_residual: output of the last block minus input of the first tail block, [1, N, D].
        cond: conditioning tensors by name, see the module's docstring.
        prediction: the model's output, [1, C, h, w].
    """

    entry: Tensor
    tail_residual: Tensor
    cond: dict[str, Tensor]
    prediction: Tensor


def facts(folder: Path) -> Facts:
    """Read a checkpoint's configurations; no weights are loaded.

    Raises:
        BadInput: the transformer is not a SanaTransformer2DModel, or a part is missing.
    """
    transformer = _config(folder / "transformer", TRANSFORMER)
    vae = _config(folder / "vae", "AutoencoderDC")
    downsampling = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
    return Facts(transformer["num_layers"], downsampling * transformer["patch_size"])


def linear_modules(folder: Path) -> list[str]:
    """Names, within a block, of the modules that may carry LoRA: linear layers and 1x1
    convolutions. The model is built without weights.
    """
    with quiet(), torch.device("meta"):
        from diffusers import SanaTransformer2DModel

        config = _config(folder / "transformer", TRANSFORMER)
        model: Any = SanaTransformer2DModel.from_config(config)
    return [
        name
        for name, module in blocks(model)[0].named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]


def _config(folder: Path, expected: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            path,
            found=f"unreadable ({error})",
            expected=f"the configuration of a {expected}",
            remedy="the folder is not a whole SanaPipeline; save or download it again",
        ) from None
    if found != expected:
        raise BadInput(path, found=f"class {found}", expected=f"{expected}")
    return config


def text_tokens(folder: Path, prompts: list[str]) -> int:
    """Length of the longest prompt in tokens, as `encode_prompts` would mask it.

    The pipeline encodes instruction + prompt, then keeps the first token and the last
    `MAX_TEXT_TOKENS` - 1 positions (SanaPipeline.encode_prompt).

    Raises:
        BadInput: a prompt the pipeline would cut off.
    """
    with quiet():
        from diffusers import SanaPipeline
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    prefix = "\n".join(instruction(SanaPipeline))
    prefix_tokens = len(tokenizer.encode(prefix))
    longest = 1
    for prompt in prompts:
        # The pipeline lowercases and strips before it tokenises.
        tokens = len(tokenizer.encode(prefix + prompt.lower().strip())) - prefix_tokens + 2
        if tokens > MAX_TEXT_TOKENS:
            raise BadInput(
                f"prompt {prompt[:60]!r}...",
                found=f"{tokens} tokens",
                expected=f"at most {MAX_TEXT_TOKENS}, more would be cut off",
                remedy="shorten it",
            )
        longest = max(longest, tokens)
    return longest


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks in order."""
    return model.transformer_blocks  # type: ignore[return-value]


def run_block(
    block: nn.Module, h: Tensor, cond: Mapping[str, Tensor], size: tuple[int, int]
) -> Tensor:
    """One transformer block.

    Args:
        block: a SanaTransformerBlock.
        h: hidden state [1, N, D].
        cond: conditioning tensors by name.
        size: token grid (rows, columns) with rows * columns = N.
    """
    return block(
        h,
        None,
        cond["encoder_hidden_states"],
        cond["encoder_attention_mask"],
        cond["timestep"],
        *size,
    )


def head(model: Any, h: Tensor, cond: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """From the last hidden state [1, N, D] to the velocity [1, C, h, w]; ``model`` needs only
    norm_out, scale_shift_table, proj_out and config.patch_size.
    """
    h = model.norm_out(h, cond["embedded_timestep"], model.scale_shift_table)
    h = model.proj_out(h)
    p = model.config.patch_size
    rows, columns = size
    h = h.reshape(1, rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(1, -1, rows * p, columns * p)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture(
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    head_skip: int,
    tail_skip: int,
) -> Captured:
    """Run the stock forward once and note what crosses the borders of the trained blocks.

    The states are read by hooks on the model's own forward, so nothing of it is repeated here.

    Args:
        model: the frozen transformer.
        latents: noised latents [1, C, h, w].
        timestep: sigma * num_train_timesteps, [1].
        prompt_embeds: text encoder output [1, L, caption width].
        prompt_mask: 1 for a token, 0 for padding, [1, L].
        head_skip: number of leading blocks that are not trained (n).
        tail_skip: number of trailing blocks that are not trained (m).
    """
    layers = blocks(model)
    seen: dict[str, Any] = {}

    def at_entry(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["entry"], _, seen["text"], seen["mask"], seen["timestep"] = args[:5]

    def at_tail(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["tail"] = args[0]

    def at_head(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["last"], seen["embedded_timestep"] = args[:2]

    first_tail = len(layers) - tail_skip
    handles = [
        layers[head_skip].register_forward_pre_hook(at_entry),
        model.norm_out.register_forward_pre_hook(at_head),  # type: ignore[union-attr]
    ]
    if tail_skip:
        handles.append(layers[first_tail].register_forward_pre_hook(at_tail))
    with _hooks(handles):
        prediction = model(
            latents,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_mask,
            timestep=timestep,
            return_dict=False,
        )[0]
    tail = seen["tail"] if tail_skip else seen["last"]
    cond = {
        "encoder_hidden_states": seen["text"],
        "encoder_attention_mask": seen["mask"],
        "timestep": seen["timestep"],
        "embedded_timestep": seen["embedded_timestep"],
    }
    return Captured(seen["entry"], seen["last"] - tail, cond, prediction)


def blank(model: nn.Module, grid: tuple[int, int], text: int) -> tuple[Tensor, ...]:
    """Inputs of `capture` of the right shapes: latents, timestep, prompt embeddings, mask.

    Args:
        model: the transformer.
        grid: token rows and columns.
        text: text tokens.
    """
    config: Any = model.config
    rows, columns = (side * config.patch_size for side in grid)
    return (
        torch.zeros(1, config.in_channels, rows, columns),
        torch.zeros(1),
        torch.zeros(1, text, config.caption_channels),
        torch.ones(1, text),
    )


def encode_image(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Clean latents [1, C, h, w] of pixels [1, 3, H, W] in [-1, 1], scaled as SanaPipeline does."""
    with torch.no_grad():
        return vae.encode(pixels).latent * vae.config.scaling_factor  # type: ignore[operator,union-attr]


def instruction(pipeline_class: type) -> list[str]:
    """The complex human instruction that the pipeline puts before every prompt by default."""
    return (
        inspect.signature(pipeline_class.__call__).parameters["complex_human_instruction"].default
    )


def encode_prompts(pipeline: Any, prompts: list[str]) -> list[tuple[Tensor, Tensor]]:
    """(embeddings [1, L, width], mask [1, L]) of each prompt, exactly as the pipeline samples with,
    before the cut to the job's text length; L = `MAX_TEXT_TOKENS`.
    """
    encoded = []
    with torch.no_grad():
        for prompt in prompts:
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                device=torch.device("cpu"),
                max_sequence_length=MAX_TEXT_TOKENS,
                complex_human_instruction=instruction(type(pipeline)),
            )
            encoded.append((embeds, mask))
    return encoded


def sample(pipeline: Any, prompt: str, side: int, seeds: list[int]) -> list[Any]:
    """Square pictures of ``side`` pixels (PIL), one a seed, by the stock pipeline in 20 steps."""
    return pipeline(
        [prompt] * len(seeds),
        height=side,
        width=side,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        use_resolution_binning=False,
    ).images


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's scheduler configuration.

    Raises:
        BadInput: missing or unreadable.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            path, found=f"unreadable ({error})", expected="a scheduler's configuration"
        ) from None


def sigmas(scheduler_config: Mapping[str, Any]) -> np.ndarray:
    """All noise levels of the checkpoint's scheduler, ascending in (0, 1], float32 [T].

    Both schedulers SANA ships with use the same T levels k / T, k = 1..T, bent by their shift s:
    sigma -> s sigma / (1 + (s - 1) sigma) (diffusers, FlowMatchEulerDiscreteScheduler.__init__ and
    DPMSolverMultistepScheduler.set_timesteps with use_flow_sigmas).
    """
    steps = int(scheduler_config.get("num_train_timesteps", 1000))
    shift = float(scheduler_config.get("flow_shift", scheduler_config.get("shift", 1.0)))
    linear = np.arange(1, steps + 1, dtype=np.float64) / steps
    return (shift * linear / (1 + (shift - 1) * linear)).astype(np.float32)
