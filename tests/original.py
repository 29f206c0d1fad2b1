"""Small pipelines as one file, in the layout that the models' authors publish.

The inverse of diffusers' loaders/single_file_utils.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

SD3_OUTER = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
SD3_JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SANA_OUTER = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}
SANA_BLOCK = {
    "scale_shift_table": "scale_shift_table",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
SANA_JOINED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
VAE = (
    (r"conv_norm_out", "norm_out"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
    (r"conv_shortcut", "nin_shortcut"),
)


def _renamed(state: State, outer: dict[str, str]) -> State:
    made = {}
    for new, old in outer.items():
        for end in ("", ".weight", ".bias"):
            if new + end in state:
                made[old + end] = state[new + end]
    return made


def _blocks(
    state: State, count: int, prefix: str, block: dict[str, str], joined: dict[str, tuple[str, ...]]
) -> State:
    made = {}
    for number in range(count):
        start = f"transformer_blocks.{number}."
        inner = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        names = {ours: theirs for theirs, ours in block.items()}
        made |= {f"{prefix}.{number}.{k}": v for k, v in _renamed(inner, names).items()}
        for theirs, ours in joined.items():
            for end in (".weight", ".bias"):
                if ours[0] + end in inner:
                    whole = torch.cat([inner[name + end] for name in ours])
                    made[f"{prefix}.{number}.{theirs}{end}"] = whole
    return made


def _swapped(tensor: Tensor) -> Tensor:
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def sd3(folder: Path) -> State:
    """The transformer of a Stable Diffusion 3 folder."""
    state = _load(folder / "transformer")
    count = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks"))
    made = _renamed(state, SD3_OUTER)
    made |= _blocks(state, count, "joint_blocks", SD3_BLOCK, SD3_JOINED)
    last = f"joint_blocks.{count - 1}.context_block.adaLN_modulation.1"
    for name in (last, "final_layer.adaLN_modulation.1"):
        for end in (".weight", ".bias"):
            made[name + end] = _swapped(made[name + end])
    return {f"model.diffusion_model.{name}": tensor for name, tensor in made.items()}


def sana(folder: Path) -> State:
    """The transformer of a SANA folder."""
    state = _load(folder / "transformer")
    count = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks"))
    made = _renamed(state, SANA_OUTER)
    made |= _blocks(state, count, "blocks", SANA_BLOCK, SANA_JOINED)
    return made | {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}


def autoencoder(folder: Path) -> State:
    """The AutoencoderKL of a folder, as "first_stage_model."."""
    state = _load(folder / "vae")
    ups = 1 + max(int(k.split(".")[2]) for k in state if "up_blocks" in k)
    made = {}
    for name, tensor in state.items():
        for pattern, to in VAE:
            name = re.sub(pattern, to, name)
        up = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)(.*)", name)
        if up:
            kind = f"block.{up[3]}" if up[3] else "upsample"
            name = f"decoder.up.{ups - 1 - int(up[1])}.{kind}{up[4]}"
        if "attn_1" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        made[f"first_stage_model.{name}"] = tensor
    return made


def encoders(folder: Path, names: dict[str, str]) -> State:
    """Text encoders of a folder; ``names`` is part -> name in the file."""
    made = {}
    for part, name in names.items():
        state = _load(folder / part)
        if name == "clip_l" and not any(k.startswith("text_model.") for k in state):
            state = {f"text_model.{k}": v for k, v in state.items()}
        made |= {f"text_encoders.{name}.transformer.{k}": v for k, v in state.items()}
    return made


def write(state: State, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_file({k: v.to(dtype).contiguous() for k, v in state.items()}, path)
    return path


def _load(part: Path) -> State:
    (file,) = part.glob("*.safetensors")
    return load_file(file)
