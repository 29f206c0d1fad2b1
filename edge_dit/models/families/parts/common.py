"""What several families' configurations have in common: rules, widths that must fit, schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.models.components import refusing
from edge_dit.models.families.parts import switches
from edge_dit.models.families.parts.switches import Misfits, Rules

KL_SWITCHES: Rules = {
    "in_channels": switches.one_of(3, why="pictures have red, green and blue"),
    "out_channels": switches.one_of(3, why="pictures have red, green and blue"),
    "latent_channels": switches.whole(),
    "block_out_channels": switches.several(switches.whole(), least=1),
    "scaling_factor": switches.positive(),
}
"""Rules of AutoencoderKL."""
SHIFTED_SWITCHES: Rules = {**KL_SWITCHES, "shift_factor": switches.finite()}
"""Rules of AutoencoderKL in pipelines that shift latents."""
SCHEDULER = Path("scheduler/scheduler_config.json")
FLOW_SWITCHES: Rules = {
    "num_train_timesteps": switches.whole(switches.MOST_STEPS),
    "shift": switches.optional(switches.positive()),
    "flow_shift": switches.optional(switches.positive()),
    "invert_sigmas": switches.one_of(False, None, why="noise grows with the timestep"),
    "prediction_type": switches.one_of(
        "flow_prediction", "trigflow", None, why="the family predicts a velocity"
    ),
    "use_flow_sigmas": switches.one_of(True, None, why="the family predicts a velocity"),
}
"""Rules of a scheduler of flow matching. A class has some of the keys; null stands for the rest."""


def patch_misfits(config: Mapping[str, Any], table: bool) -> Misfits:
    """What contradicts itself in a configuration with a `PatchEmbed`.

    Args:
        config: of the transformer.
        table: whether it has sines and cosines of positions.
    """
    if config["sample_size"] < config["patch_size"]:
        yield "patch_size", f"at most {config['sample_size']}, the sample_size"
    if table and inner_width(config) % 4:
        yield "attention_head_dim", "a multiple of 4 times num_attention_heads, for the positions"


def rotary_misfits(config: Mapping[str, Any]) -> Misfits:
    """What contradicts itself in a configuration with rotary positions of three axes."""
    if sum(config["axes_dims_rope"]) != config["attention_head_dim"]:
        yield "axes_dims_rope", f"a sum of {config['attention_head_dim']}, the attention_head_dim"


def beyond_positions(
    key: str, most: int, sizes: Mapping[str, int], multiple: int
) -> list[BadInput]:
    """Sizes with more tokens a side than a table of positions has.

    Args:
        key: of the table's length in the transformer's configuration.
        most: tokens a side.
        sizes: where each stands -> pixels.
        multiple: pixels per side of a token.
    """
    return [
        BadInput(
            where,
            found=f"{pixels} pixels, {pixels // multiple} tokens a side",
            expected=f"at most {most} tokens: {key} in transformer/config.json",
            remedy=f"at most {most * multiple} pixels",
        )
        for where, pixels in sizes.items()
        if pixels // multiple > most
    ]


def caption_misfits(config: Mapping[str, Any]) -> Misfits:
    """What contradicts itself where projected captions enter by cross-attention."""
    if config["cross_attention_dim"] != inner_width(config):
        expected = f"{inner_width(config)}, num_attention_heads times attention_head_dim"
        yield "cross_attention_dim", expected


def inner_width(config: Mapping[str, Any]) -> int:
    """Features of a token between the blocks."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def flow_objective(scheduler: Mapping[str, Any], **options: bool) -> FlowMatching:
    """Flow matching over a scheduler's noise levels.

    Args:
        scheduler: its configuration.
        options: of `FlowMatching`.

    Raises:
        BadInput: it is no scheduler of flow matching, or says what is not implemented.
    """
    return scheduler_objective(
        scheduler, FLOW_SWITCHES, lambda own: FlowMatching(flow_sigmas(own), **options)
    )


def scheduler_objective(
    scheduler: Mapping[str, Any], rules: Rules, make: Callable[[dict[str, Any]], Any]
) -> Any:
    """What is learned, by a scheduler's configuration with every key.

    Args:
        scheduler: its configuration.
        rules: of the family; a key that neither the class nor the configuration has is null.
        make: makes the objective of the whole configuration.

    Raises:
        BadInput: it breaks a rule, or diffusers cannot build it.
    """
    config = {**switches.defaults_of(str(scheduler.get("_class_name"))), **scheduler}
    switches.check(SCHEDULER, {key: config.get(key) for key in rules}, rules, {})
    expected = f"a configuration of {scheduler['_class_name']}"
    with refusing(SCHEDULER, "diffusers cannot build it", expected):
        return make(config)


def flow_sigmas(scheduler: Mapping[str, Any]) -> np.ndarray:
    """All noise levels of a flow-matching scheduler, ascending, float32 [T].

    FlowMatchEulerDiscreteScheduler computes them itself; with dynamic shifting they are unshifted,
    as diffusers' training scripts use them. Other schedulers shift the T levels k / T, k = 1..T, by
    s: sigma -> s sigma / (1 + (s - 1) sigma) (DPMSolverMultistepScheduler.set_timesteps with
    use_flow_sigmas).

    Args:
        scheduler: its configuration.
    """
    if scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        own: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler))
        sigmas = own.sigmas[own.sigmas > 0].numpy()
        return np.sort(sigmas).astype(np.float32)
    steps = int(scheduler.get("num_train_timesteps", 1000))
    shift = float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
    linear = np.arange(1, steps + 1, dtype=np.float64) / steps
    return (shift * linear / (1 + (shift - 1) * linear)).astype(np.float32)


def alphas_cumprod(scheduler: Mapping[str, Any]) -> np.ndarray:
    """a_t of a diffusion scheduler by timestep, float64 [T].

    Args:
        scheduler: its configuration.
    """
    from diffusers import DDPMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    options = {key: scheduler[key] for key in keys if scheduler.get(key) is not None}
    own: Any = DDPMScheduler(**options)
    return own.alphas_cumprod.to(torch.float64).numpy()
