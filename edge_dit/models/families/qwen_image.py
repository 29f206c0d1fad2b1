"""Qwen-Image (arXiv 2508.02324): QwenImageTransformer2DModel.

Double-stream blocks. Text and image tokens attend jointly, and padding is masked. Positions rotate
queries and keys as complex numbers.

Conditioning (D = width, N = image tokens, L = text tokens, d = head width):

    temb                        [1, D]          embedding of the timestep; with zero_cond_t [2, D],
                                                the second of timestep 0
    encoder_hidden_states_mask  [1, L]          1 for a token, 0 for padding
    rope_image                  [N, d / 2, 2]   real and imaginary parts, the same for every draw
    rope_text                   [L, d / 2, 2]

zero_cond_t modulates the tokens of pictures that are given beside the prompt as if they were free
of noise. QwenImagePipeline gives none, so every token is of the first kind (modulate_index is 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from edge_dit.contract.loop import Latents
from edge_dit.contract.objective import FlowMatching
from edge_dit.models.families.family import (
    Conditioning,
    Family,
    Grid,
    Prompt,
    cut,
    longest,
    tokenizer_of,
)
from edge_dit.models.families.parts.common import (
    flow_objective,
    rotary_misfits,
)
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    Misfits,
    Rules,
    axes,
    finite,
    flag,
    idle,
    one_of,
    positive,
    several,
    whole,
)
from edge_dit.models.pipeline import quiet

MAX_TEXT_TOKENS = 512
"""max_sequence_length of QwenImagePipeline and of diffusers' training script."""


class QwenVae(Family):
    """A family with Qwen-Image's autoencoder. To it a picture is a film of one frame, and every
    channel of its latents has a mean and a deviation of its own. A token is 2 x 2 latents.
    """

    autoencoder = "AutoencoderKLQwenImage"
    packed = 4
    vae_switches: ClassVar[Rules] = {
        "input_channels": one_of(3, why="pictures have red, green and blue"),
        "z_dim": whole(),
        "dim_mult": several(whole(), least=1),
        "temperal_downsample": several(flag()),
        "latents_mean": several(finite(), least=1),
        "latents_std": several(positive(), least=1),
    }

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per side of a latent."""
        return 2 ** len(vae["temperal_downsample"])

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token; the pipeline packs 2 x 2 latents into one."""
        return self.factor(vae) * 2

    def latents(self, vae: Any) -> Latents:
        """Every channel by its own mean and deviation."""
        return Latents(
            shift=list(vae.config["latents_mean"]),
            scale=[1 / deviation for deviation in vae.config["latents_std"]],
            packed=self.packed > 1,
            factor=self.factor(vae.config),
            samples=self.samples_posterior,
        )

    def vae_misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Lists of other lengths than the autoencoder has stages and channels."""
        if len(config["temperal_downsample"]) != len(config["dim_mult"]) - 1:
            yield (
                "temperal_downsample",
                f"{len(config['dim_mult']) - 1} values, one less than dim_mult",
            )
        for key in ("latents_mean", "latents_std"):
            if len(config[key]) != config["z_dim"]:
                yield key, f"{config['z_dim']} values, the z_dim"

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation [1, C, h, w]; to the autoencoder an image is a film of one frame."""
        found = vae.encode(pixels.unsqueeze(2)).latent_dist
        return found.mean.squeeze(2), found.std.squeeze(2)

    def pixels(self, vae: Any, raw: Tensor) -> Tensor:
        """The picture [1, 3, H, W], the only frame of a film."""
        return vae.decode(raw.unsqueeze(2), return_dict=False)[0].squeeze(2)


class QwenImage(QwenVae):
    """Qwen-Image."""

    name = "qwen_image"
    transformer = "QwenImageTransformer2DModel"
    joint = True
    # diffusers' train_dreambooth_lora_qwen_image.py
    lora_targets = tuple(f"attn.{proj}" for proj in ("to_q", "to_k", "to_v", "to_out.0"))
    text_output = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    per_prompt = ("encoder_hidden_states_mask", "rope_image", "rope_text")
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "joint_attention_dim": ("text_encoder",)
    }
    guided_by = "true_cfg_scale"
    rescales = True
    negative_prompt = " "
    switches: ClassVar[Rules] = {
        "patch_size": one_of(2, why="QwenImagePipeline packs latents 2 x 2 whatever it says"),
        "in_channels": whole(),
        "out_channels": whole(),
        "num_layers": whole(DEEPEST),
        "attention_head_dim": whole(),
        "num_attention_heads": whole(),
        "joint_attention_dim": whole(),
        "guidance_embeds": one_of(False, why="diffusers' own forward fails with it"),
        "axes_dims_rope": axes(),
        "zero_cond_t": flag(),
        "use_additional_t_cond": one_of(False, why="QwenImagePipeline passes no such condition"),
        "use_layer3d_rope": flag(),
        # Qwen-Image's own configuration has it, though its class never had pooled text.
        "pooled_projection_dim": idle(),
    }

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The pipeline divides by 1000."""
        return 1 / 1000

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Channels that differ between input and output, and widths that do not add up."""
        if config["in_channels"] != 4 * config["out_channels"]:
            yield "out_channels", "a quarter of in_channels: a token is 2 x 2 latents"
        yield from rotary_misfits(config)

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt within the pipeline's template.

        The pipeline drops the first tokens of the template after it has encoded them.
        """
        with quiet():
            from diffusers import QwenImagePipeline
        bare: Any = QwenImagePipeline(None, None, None, None, None)  # type: ignore[arg-type]
        template, dropped = bare.prompt_template_encode, bare.prompt_template_encode_start_idx
        tokenizer = tokenizer_of(folder)
        lengths = {
            prompt: len(tokenizer.encode(template.format(prompt))) - dropped for prompt in prompts
        }
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, N, C], packed."""
        return {
            "hidden_states": latents,
            **prompt,
            "timestep": torch.tensor([timestep * self.timestep_factor(model.config)]),
            "img_shapes": [[(1, *grid)]],
        }

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        image, text = call["image_rotary_emb"]
        return {
            "temb": call["temb"],
            "encoder_hidden_states_mask": call["encoder_hidden_states_mask"].float(),
            "rope_image": torch.view_as_real(image),
            "rope_text": torch.view_as_real(text),
        }

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Temb, the mask as bool, and the rotary embeddings, complex unless `traceable`; with
        zero_cond_t the kind of each token, [1, N] int32.
        """
        image, text = cond["rope_image"], cond["rope_text"]
        if self.traced:
            rope = image.flatten(-2), text.flatten(-2)
        else:
            rope = torch.view_as_complex(image), torch.view_as_complex(text)
        arguments = {
            "temb": cond["temb"],
            "encoder_hidden_states_mask": cond["encoder_hidden_states_mask"] > 0.5,
            "image_rotary_emb": rope,
        }
        if len(cond["temb"]) == 2:
            arguments["modulate_index"] = torch.zeros(1, grid[0] * grid[1], dtype=torch.int32)
        return arguments

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, N, C], packed."""
        temb = cond["temb"]
        if len(temb) == 2:
            temb = temb.chunk(2)[0]
        return model.proj_out(model.norm_out(image, temb))

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, N, C], packed, and a prompt of ``text`` tokens."""
        config = model.config
        prompt = {
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(1, text),
        }
        return torch.zeros(1, grid[0] * grid[1], config.in_channels), prompt

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt.

        Shorter prompts are padded with zeros, as the pipeline pads the shorter ones of a batch.
        """
        encoded = []
        for prompt in prompts:
            # The mask it returns is None because a single prompt has no padding.
            embeds, _ = pipeline.encode_prompt(
                prompt, device=torch.device("cpu"), max_sequence_length=MAX_TEXT_TOKENS
            )
            missing = max(0, tokens - embeds.shape[1])
            mask = torch.ones(1, embeds.shape[1])
            named = {
                "encoder_hidden_states": pad(embeds.float(), (0, 0, 0, missing)),
                "encoder_hidden_states_mask": pad(mask, (0, missing)),
            }
            encoded.append(
                cut(named, "encoder_hidden_states", "encoder_hidden_states_mask", tokens)
            )
        return encoded

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 guided steps; the pipeline takes as many negative prompts as prompts."""
        return {
            "negative_prompt": [self.negative_prompt] * pictures,
            "num_inference_steps": 20,
            "true_cfg_scale": 4.0,
            "max_sequence_length": MAX_TEXT_TOKENS,
        }


FAMILY = QwenImage()
