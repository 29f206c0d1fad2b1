"""What apps call the weights of a model that they keep as its authors published it.

There one matrix may hold the rows of several diffusers modules: FLUX's ``img_attn.qkv`` is to_q,
to_k and to_v, one above the other. LoRA of such modules becomes one LoRA: its A is their A, one
above the other, its B has their B on the diagonal. So every module changes as before.

The names, from public code:

    FLUX    kohya-ss/sd-scripts, networks/convert_flux_lora.py, convert_ai_toolkit_to_sd_scripts;
            library/flux_models.py, DoubleStreamBlock and SingleStreamBlock;
            ComfyUI, comfy/utils.py, flux_to_diffusers
    FLUX.2  diffusers, loaders/lora_conversion_utils.py,
            _convert_non_diffusers_flux2_lora_to_diffusers
    SD3     kohya-ss/sd-scripts, library/sd3_models.py, MMDiTBlock and SingleDiTBlock;
            ComfyUI, comfy/utils.py, mmdit_to_diffusers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_dit.errors import BadInput


@dataclass(frozen=True)
class Lora:
    """LoRA of one matrix [out, in]; a 1x1 convolution has two more axes of size 1.

    Attributes:
        a: lora_A, float32 [rank, in].
        b: lora_B, float32 [out, rank].
    """

    a: np.ndarray
    b: np.ndarray


Blocks = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
"""diffusers' list of blocks -> the app's list, and for each of its matrices within a block the
diffusers modules whose rows it holds, from the top."""

FLUX: Blocks = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
    ),
}
FLUX2: Blocks = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.linear_in",),
            "txt_mlp.2": ("ff_context.linear_out",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ),
}
SD3: Blocks = {
    "transformer_blocks": (
        "joint_blocks",
        {
            "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "context_block.adaLN_modulation.1": (CONTEXT_NORM := "norm1_context.linear",),
        },
    ),
}
HEIGHT = {"proj_mlp": 4}
"""Rows of a module in a shared matrix, where they are not as many as to_q's (FLUX's mlp_ratio)."""


def in_native(modules: Mapping[str, Lora], blocks: Blocks) -> dict[str, Lora]:
    """The same changes of weight, by the app's names.

    Args:
        modules: by diffusers module, "transformer_blocks.0.attn.to_q".
        blocks: the app's names.

    Raises:
        BadInput: modules for which the app has no name.
    """
    place = {
        (ours, part): (theirs, matrix)
        for ours, (theirs, matrices) in blocks.items()
        for matrix, parts in matrices.items()
        for part in parts
    }
    found: dict[str, dict[str, Lora]] = {}
    unknown = []
    for module, lora in modules.items():
        container, _, rest = module.partition(".")
        number, _, part = rest.partition(".")
        if (container, part) not in place:
            unknown.append(module)
            continue
        theirs, matrix = place[container, part]
        found.setdefault(f"{theirs}.{number}.{matrix}", {})[part] = _ordered(part, lora)
    if unknown:
        raise BadInput(
            "train.lora_targets",
            found=f"LoRA on {', '.join(unknown)}, for which this format has no name",
            remedy="write another format, or train without these modules",
        )
    parts_of = {m: parts for _, matrices in blocks.values() for m, parts in matrices.items()}
    return {
        name: _stacked(parts_of[name.split(".", 2)[2]], members) for name, members in found.items()
    }


def _ordered(part: str, lora: Lora) -> Lora:
    """``lora`` with its output in the app's order.

    In SD3's last block diffusers has scale before shift, the published model shift before scale
    (diffusers, loaders/single_file_utils.py, swap_scale_shift). That norm alone is twice as high as
    the model is wide; in other blocks it has six parts, ordered alike.
    """
    if part == CONTEXT_NORM and len(lora.b) == 2 * lora.a.shape[1]:
        return Lora(lora.a, np.roll(lora.b, len(lora.b) // 2, axis=0))
    return lora


def _stacked(parts: tuple[str, ...], members: Mapping[str, Lora]) -> Lora:
    """LoRA of the matrix that holds ``parts``; its rows of parts without LoRA do not change."""
    if len(parts) == 1:
        return members[parts[0]]
    first = next(iter(members))
    unit = len(members[first].b) // HEIGHT.get(first, 1)
    rank = sum(len(lora.a) for lora in members.values())
    b = np.zeros((unit * sum(HEIGHT.get(part, 1) for part in parts), rank), np.float32)
    stacked, row, column = [], 0, 0
    for part in parts:
        height = unit * HEIGHT.get(part, 1)
        if part in members:
            lora = members[part]
            b[row : row + height, column : column + len(lora.a)] = lora.b
            stacked.append(lora.a)
            column += len(lora.a)
        row += height
    return Lora(np.concatenate(stacked), b)
