"""Public checkpoints by name: what a plan must know of each, without its weights.

Configurations are copied from the checkpoints' own transformer/config.json, those of FLUX.2 klein
from diffusers' scripts/convert_flux2_to_diffusers.py; its distilled checkpoints have the same.
Sizes are the paper's where it gives them (docs/method.md, Eq. 1), else the full resolution and half
of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_dit.errors import BadInput
from edge_dit.models.families import family_of

if TYPE_CHECKING:
    from edge_dit.models.families.family import Family


@dataclass(frozen=True)
class PublicConfig:
    """One public checkpoint.

    Attributes:
        family: name of the family, for `edge_dit.models.families.family_of`.
        config: of the transformer.
        multiple: pixels per side of a token.
        text_tokens: length of the longest text.
        resolution: s_max of Eq. 1, pixels.
        patch: s_min of Eq. 1, pixels.
    """

    family: str
    config: dict[str, Any]
    multiple: int
    text_tokens: int
    resolution: int
    patch: int

    def resolved(self) -> Family:
        """The family (imports torch)."""
        return family_of(self.family)

    @property
    def size_step(self) -> int:
        """Pixels that sides of patches and pictures are a multiple of."""
        return self.multiple * self.resolved().token_step

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.resolved().block_names(self.config))


def _flux(guidance: bool) -> PublicConfig:
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance,
        "axes_dims_rope": (16, 56, 56),
    }
    return PublicConfig("flux", config, 16, 512, 512, 256)


def _sana(layers: int, heads: int, cross_heads: int, cross_dim: int) -> PublicConfig:
    config = {
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 32,
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_dim,
        "cross_attention_dim": cross_heads * cross_dim,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
    }
    return PublicConfig("sana", config, 32, 300, 1024, 512)


def _sd3(layers: int, heads: int, positions: int, **more: Any) -> PublicConfig:
    config = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": heads * 64,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        **more,
    }
    return PublicConfig("sd3", config, 16, 154, 1024, 512)


def _klein(layers: int, single_layers: int, heads: int, text: int) -> PublicConfig:
    config = {
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": layers,
        "num_single_layers": single_layers,
        "attention_head_dim": 128,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": False,
    }
    return PublicConfig("flux2", config, 16, 512, 1024, 512)


CONFIGS = {
    "flux.1-dev": _flux(guidance=True),
    "flux.1-schnell": _flux(guidance=False),
    "sana-0.6b": _sana(28, 36, 16, 72),
    "sana-1.6b": _sana(20, 70, 20, 112),
    "sd3-medium": _sd3(24, 24, 192),
    "sd3.5-medium": _sd3(24, 24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "sd3.5-large": _sd3(38, 38, 192, qk_norm="rms_norm"),
    "pixart-sigma-xl": PublicConfig(
        "pixart",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "attention_bias": True,
            "sample_size": 128,
            "patch_size": 2,
            "interpolation_scale": 2,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        16,
        300,
        1024,
        512,
    ),
    "qwen-image": PublicConfig(
        "qwen_image",
        {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        16,
        512,
        1024,
        512,
    ),
    "lumina-image-2.0": PublicConfig(
        "lumina2",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "multiple_of": 256,
            "ffn_dim_multiplier": None,
            "norm_eps": 1e-5,
            "axes_dim_rope": (32, 32, 32),
            "axes_lens": (300, 512, 512),
            "cap_feat_dim": 2304,
        },
        16,
        256,
        1024,
        512,
    ),
    "chroma1-hd": PublicConfig(
        "chroma",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "axes_dims_rope": (16, 56, 56),
            "approximator_num_channels": 64,
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
        },
        16,
        512,
        1024,
        512,
    ),
    "z-image": PublicConfig(
        "z_image",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": (32, 48, 48),
            "axes_lens": (1536, 512, 512),
        },
        16,
        512,
        1024,
        512,
    ),
    "krea-2": PublicConfig(
        "krea2",
        {
            "in_channels": 64,
            "num_layers": 28,
            "attention_head_dim": 128,
            "num_attention_heads": 48,
            "num_key_value_heads": 12,
            "intermediate_size": 16384,
            "timestep_embed_dim": 256,
            "text_hidden_dim": 2560,
            "num_text_layers": 12,
            "text_num_attention_heads": 20,
            "text_num_key_value_heads": 20,
            "text_intermediate_size": 6912,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": (32, 48, 48),
            "rope_theta": 1000.0,
            "norm_eps": 1e-5,
        },
        16,
        512,
        1024,
        512,
    ),
    "qwen-image-2.1": PublicConfig(
        "qwen_image21",
        {
            "patch_size": 1,
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "context_in_dim": 4096,
            "mlp_ratio": 3,
            "axes_dims_rope": (16, 56, 56),
            "eps": 1e-6,
            "causal_condition": True,
        },
        16,
        512,
        1024,
        512,
    ),
    "flux.2-klein-4b": _klein(5, 20, 24, 7680),
    "flux.2-klein-9b": _klein(8, 24, 32, 12288),
}


def public_config(name: str) -> PublicConfig:
    """The configuration called ``name``.

    Raises:
        BadInput: there is none.
    """
    if name not in CONFIGS:
        raise BadInput(
            "CONFIG", found=f"unknown configuration {name!r}", expected=", ".join(CONFIGS)
        )
    return CONFIGS[name]
