"""Z-Image (arXiv 2511.22699): ZImageTransformer2DModel.

One sequence, image first, after refiners of image and text. Either is filled up to a multiple of 32
tokens by a learned token, which takes part in attention as any other. An image token's first
position is the number of text tokens, filled up, plus one.

Conditioning (D = width, d = head width, N = image tokens, F = those that fill them up, L = text
tokens, filled up):

    adaln_input   [1, min(D, 256)]    embedding of the time
    text_mask     [1, F + L]          1 for a token, 0 for what no token of this prompt sees
    rope          [N + F + L, d]      real and imaginary parts in turn, the same for every draw

A state's text holds the F tokens that fill up the image too: no head reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.models.families.family import (
    Conditioning,
    Grid,
    Prompt,
    blank_caption,
    longest,
    masked_prompt,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.families.parts.common import (
    SHIFTED_SWITCHES,
    beyond_positions,
    flow_objective,
)
from edge_dit.models.families.parts.joined import PROMPT_MASK, ROPE, TEXT_MASK, Joined
from edge_dit.models.families.parts.real import interleaved
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    Misfits,
    Rules,
    axes,
    flag,
    lengths,
    one_of,
    positive,
    whole,
)

MAX_TEXT_TOKENS = 512
"""max_sequence_length of ZImagePipeline and of diffusers' training script."""
PATCH = 2
MULTIPLE = 32
"""Image and text tokens are filled up to a multiple of it."""


class ZImage(Joined):
    """Z-Image, and Z-Image-Turbo."""

    name = "z_image"
    transformer = "ZImageTransformer2DModel"
    autoencoder = "AutoencoderKL"
    containers: ClassVar[dict[str, str]] = {"layers": "n_layers"}
    text_first = False
    stream = "x"
    drops_padding = True
    head_modules = ("all_final_layer",)
    # diffusers' train_dreambooth_lora_z_image.py
    lora_targets = tuple(f"attention.{proj}" for proj in ("to_k", "to_q", "to_v", "to_out.0"))
    per_prompt = (TEXT_MASK, ROPE)
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {"cap_feat_dim": ("text_encoder",)}
    samples_posterior = False
    towards_picture = True
    guided_from = 0
    switches: ClassVar[Rules] = {
        "all_patch_size": one_of((PATCH,), why="ZImagePipeline makes patches of 2 x 2 latents"),
        "all_f_patch_size": one_of((1,), why="a picture is a film of one frame"),
        "in_channels": whole(),
        "dim": whole(),
        "n_layers": whole(DEEPEST),
        "n_refiner_layers": whole(DEEPEST, least=0),
        "n_heads": whole(),
        "n_kv_heads": whole(),
        "norm_eps": positive(),
        "qk_norm": flag(),
        "cap_feat_dim": whole(),
        "siglip_feat_dim": one_of(None, why="ZImagePipeline passes no pictures"),
        "rope_theta": positive(),
        "t_scale": positive(),
        "axes_dims": axes(),
        "axes_lens": lengths(3),
    }
    vae_switches = SHIFTED_SWITCHES

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Widths that do not add up, and too few positions of text."""
        heads, width = config["n_heads"], config["dim"]
        if width % heads:
            yield "dim", f"a multiple of {heads}, the n_heads"
        if config["n_kv_heads"] != heads:
            yield "n_kv_heads", f"{heads}, the n_heads: diffusers makes as many whatever it says"
        if sum(config["axes_dims"]) * heads != width:
            yield "axes_dims", f"a sum of {width // heads}, the width of a head"
        if config["axes_lens"][0] < MAX_TEXT_TOKENS + 2:
            yield "axes_lens", f"{MAX_TEXT_TOKENS + 2} or more positions of text and image"

    def grid_faults(
        self, config: Mapping[str, Any], sizes: Mapping[str, int], multiple: int
    ) -> list[BadInput]:
        """Sizes with more tokens a side than the model has positions."""
        return beyond_positions("axes_lens", min(config["axes_lens"][1:]), sizes, multiple)

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token."""
        return self.factor(vae) * PATCH

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """1: `handed` divides after it has subtracted, which is exact near the picture."""
        return 1.0

    def handed(self, timestep: Tensor) -> Tensor:
        """The share of the picture, as ZImagePipeline computes it."""
        return (1000 - timestep) / 1000

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt, as a message to the text encoder's chat model."""
        tokenizer = tokenizer_of(folder)
        lengths = {}
        for prompt in prompts:
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            lengths[prompt] = len(tokenizer.encode(text))
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of `forward`; latents [1, C, h, w]."""
        passed = self.handed(torch.tensor([timestep]))
        return {"hidden_states": latents, "timestep": passed, **prompt}

    def forward(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Picture minus noise, [1, C, h, w]."""
        latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"][0]
        if not self.traced:
            text = text[: int(inputs[PROMPT_MASK].sum())]
        (found,) = model([latents[0].unsqueeze(1)], inputs["timestep"], [text], return_dict=False)[
            0
        ]
        return found.squeeze(1).unsqueeze(0)

    def image_tokens(self, model: Any, inputs: Mapping[str, Any]) -> int:
        """Number of image tokens, without those that fill them up."""
        latents = inputs["x"][0] if "x" in inputs else inputs["hidden_states"]
        return latents.shape[-2] * latents.shape[-1] // PATCH**2

    @contextmanager
    def prelude(self, model: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
        """A context in which a traced prompt keeps its padding, which no token sees. In torch the
        stock forward gets the tokens that are there.
        """
        if not self.traced:
            yield
            return
        from diffusers.models.transformers import transformer_z_image as module

        stock, mask, padded = model.rope_embedder, inputs[PROMPT_MASK][0], module.pad_sequence
        # Of one sequence there is nothing to pad, and a trace has no place to write it to.
        module.pad_sequence = lambda sequences, **_: torch.stack(sequences)
        model.rope_embedder = _real(stock)
        model.patchify_and_embed = _Placed(model.patchify_and_embed, mask)

        def hide(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0], seen_of(mask).unsqueeze(0), *args[2:]

        hooks = [layer.register_forward_pre_hook(hide) for layer in model.context_refiner]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            del model.patchify_and_embed
            model.rope_embedder = stock
            module.pad_sequence = padded

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        seen = seen_of(call[PROMPT_MASK][0]).float()
        image = self.image_tokens(None, {"hidden_states": call["hidden_states"]})
        others = torch.cat([torch.ones(-image % MULTIPLE), seen])
        rope = call["freqs_cis"][0]
        rope = rope if self.traced else interleaved(rope)
        rope = pad(rope, (0, 0, 0, image + len(others) - len(rope)))
        used = torch.cat([torch.ones(image), others]).unsqueeze(1)
        return {
            "adaln_input": call["adaln_input"],
            TEXT_MASK: others.unsqueeze(0),
            ROPE: rope * used,
        }

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """The time's embedding, the rotations and, if `traceable`, a mask."""
        image = grid[0] * grid[1]
        return {
            "adaln_input": cond["adaln_input"],
            "freqs_cis": self.rotations(cond, image).unsqueeze(0),
            "attn_mask": self.sequence_mask(cond, image),
        }

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """Picture minus noise, [1, C, h, w]."""
        layer = model.all_final_layer[f"{PATCH}-1"]
        return unpatchify(layer(image, c=cond["adaln_input"]), grid, PATCH)

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, C, h, w] and a prompt of ``text`` tokens."""
        rows, columns = (side * PATCH for side in grid)
        latents = torch.zeros(1, model.config.in_channels, rows, columns)
        return latents, blank_caption(model.config.cap_feat_dim, text)

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, None]:
        """Latents [1, C, h, w]: the mode, as the stock script takes it."""
        return vae.encode(pixels).latent_dist.mode(), None

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt; padding is zeros."""
        encoded = []
        for prompt in prompts:
            (embeds,), _ = pipeline.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                do_classifier_free_guidance=False,
                max_sequence_length=MAX_TEXT_TOKENS,
            )
            missing = max(0, tokens - len(embeds))
            text = pad(embeds, (0, 0, 0, missing)).unsqueeze(0)
            mask = pad(torch.ones(1, len(embeds)), (0, missing))
            encoded.append(masked_prompt(text, mask, tokens))
        return encoded

    def as_arguments(self, prompt: Prompt) -> dict[str, Any]:
        """The tokens that are there, in a list."""
        used = int(prompt[PROMPT_MASK].sum())
        return {"prompt_embeds": [prompt["encoder_hidden_states"][0, :used]]}

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 guided steps."""
        return {"num_inference_steps": 20, "guidance_scale": 4.0}


def seen_of(mask: Tensor) -> Tensor:
    """Which text tokens are seen, bool [L]: those of a prompt and what fills them up.

    Args:
        mask: of the prompt, 1 for a token, 0 for padding; of any length.
    """
    filled = len(mask) + -len(mask) % MULTIPLE
    return torch.arange(filled) < torch.ceil(mask.sum() / MULTIPLE) * MULTIPLE


def _real(stock: Any) -> Any:
    """A RopeEmbedder whose tables are real and imaginary parts in turn."""
    tables = stock.precompute_freqs_cis(stock.axes_dims, stock.axes_lens, theta=stock.theta)
    real = copy.copy(stock)
    real.freqs_cis = [interleaved(table) for table in tables]
    return real


class _Placed:
    """Takes the place of a model's patchify_and_embed, for one picture and a prompt with padding:
    the learned token where the prompt ends, and the image's positions after that.

    Args:
        stock: the model's own.
        mask: of the prompt, 1 for a token, 0 for padding.
    """

    def __init__(self, stock: Callable[..., Any], mask: Tensor) -> None:
        self.stock, self.mask = stock, mask

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """What the stock method returns."""
        images, texts, sizes, (places,), text_places, (fills,), _ = self.stock(*arguments)
        seen = seen_of(self.mask)
        first = torch.where(fills, 0, seen.sum() + 1)
        # ONNX looks nothing up by numbers of 32 bits.
        places = torch.cat([first.unsqueeze(1), places[:, 1:].to(torch.int64)], dim=1)
        padding = pad(self.mask, (0, len(seen) - len(self.mask))) < 0.5
        return images, texts, sizes, [places], text_places, [fills], [padding]


FAMILY = ZImage()
