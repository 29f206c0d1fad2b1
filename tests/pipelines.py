"""Whole pipelines on disk, small: the stock classes with random weights and tokenizers made here.

Every folder loads by `DiffusionPipeline.from_pretrained`; the transformers are those of `variants`.
"""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import variants
from edge_dit.models.pipeline import processor_of, without_films

SHORT = "a sks toy"
LONG = "A large red sks toy, at the left of two green boxes "
"""Upper case, punctuation and a last blank: pipelines differ in what they make of them."""
TEXT_LIMIT = 24
"""FLUX's text length here: what its second tokenizer says."""
CLIP_LIMIT = 20
CHAT_LIMIT = 40
SIZE = (32, 64)
"""Height and width in pixels that every pipeline here accepts; not square."""

PIPELINES = {
    "sana": ("SanaPipeline", "sana"),
    "sana-1.5": ("SanaPipeline", "sana-1.5"),
    "sana-sprint": ("SanaSprintPipeline", "sana-sprint"),
    "flux-dev": ("FluxPipeline", "flux-dev"),
    "flux-schnell": ("FluxPipeline", "flux-schnell"),
    "sd3-medium": ("StableDiffusion3Pipeline", "sd3-medium"),
    "sd3-without-t5": ("StableDiffusion3Pipeline", "sd3-medium"),
    "sd3.5-medium": ("StableDiffusion3Pipeline", "sd3.5-medium"),
    "pixart-sigma": ("PixArtSigmaPipeline", "pixart-sigma"),
    "qwen-image": ("QwenImagePipeline", "qwen-image"),
    "qwen-image-zero-cond": ("QwenImagePipeline", "qwen-image-zero-cond"),
    "lumina2": ("Lumina2Pipeline", "lumina2"),
    "chroma": ("ChromaPipeline", "chroma"),
    "flux2-klein": ("Flux2KleinPipeline", "flux2-klein"),
    "flux2-klein-distilled": ("Flux2KleinPipeline", "flux2-klein"),
    "z-image": ("ZImagePipeline", "z-image"),
    "krea-2": ("Krea2Pipeline", "krea-2"),
    "qwen-image-2.1": ("QwenImage21Pipeline", "qwen-image-2.1"),
}
"""Name -> pipeline class, and the variant of its transformer."""


def write_pipeline(name: str, folder: Path) -> Path:
    """Save a pipeline of `PIPELINES`; its folder."""
    class_name, variant = PIPELINES[name]
    parts = {
        "SanaPipeline": _sana_parts,
        "SanaSprintPipeline": _sprint_parts,
        "FluxPipeline": _flux_parts,
        "StableDiffusion3Pipeline": _sd3_parts,
        "PixArtSigmaPipeline": _pixart_parts,
        "QwenImagePipeline": _qwen_parts,
        "Lumina2Pipeline": _lumina2_parts,
        "ChromaPipeline": _chroma_parts,
        "Flux2KleinPipeline": _flux2_parts,
        "ZImagePipeline": _z_image_parts,
        "Krea2Pipeline": _krea2_parts,
        "QwenImage21Pipeline": _qwen21_parts,
    }[class_name]()
    if name == "sd3-without-t5":
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if name == "flux2-klein-distilled":
        parts["is_distilled"] = True
    if name == "flux-schnell":
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = getattr(diffusers, class_name)(transformer=variants.transformer(variant), **parts)
    pipeline.save_pretrained(folder)
    return folder


def load_stock(folder: Path, **options: Any) -> Any:
    """The pipeline of a folder by diffusers' own road, but for the part of a processor that wants
    torchvision.
    """
    if (folder / "processor").is_dir():
        options["processor"] = processor_of(folder)
    return diffusers.DiffusionPipeline.from_pretrained(folder, **options)


# ---------------------------------------------------------------- pipelines


def _sana_parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _gemma(len(tokenizer)),
        "vae": _autoencoder_dc(),
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _sprint_parts() -> dict[str, Any]:
    return {**_sana_parts(), "scheduler": SCMScheduler()}


def _flux_parts() -> dict[str, Any]:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer(TEXT_LIMIT)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": _clip(CLIPTextModel, tokenizer, 12, 12),
        "text_encoder_2": _t5(len(tokenizer_2)),
        "vae": _autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _sd3_parts() -> dict[str, Any]:
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer(512)
    # Widths and projections differ, so that the encoders cannot change places unseen; together
    # they are narrower than T5, as in the real ones.
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer_3,
        "text_encoder": _clip(CLIPTextModelWithProjection, tokenizer, 8, 5),
        "text_encoder_2": _clip(CLIPTextModelWithProjection, tokenizer, 12, 7),
        "text_encoder_3": _t5(len(tokenizer_3)),
        "vae": _autoencoder_kl(scaling_factor=1.5305, shift_factor=0.0609),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _pixart_parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer(512)
    return {
        "tokenizer": tokenizer,
        "text_encoder": _t5(len(tokenizer)),
        "vae": _autoencoder_kl(scaling_factor=0.13025),
        "scheduler": DPMSolverMultistepScheduler(beta_schedule="linear"),
    }


def _qwen_parts() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen(tokenizer),
        "vae": _autoencoder_qwen(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    }


def _lumina2_parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _gemma(len(tokenizer)),
        "vae": _autoencoder_kl(stages=4, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }


def _chroma_parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer(TEXT_LIMIT)
    return {
        "tokenizer": tokenizer,
        "text_encoder": _t5(len(tokenizer)),
        "vae": _autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
    }


def _flux2_parts() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen3(tokenizer),
        "vae": _autoencoder_flux2(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _z_image_parts() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen3_short(tokenizer),
        "vae": _autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _krea2_parts() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen3_vl(tokenizer, Qwen3VLModel),
        "vae": _autoencoder_qwen(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        "text_encoder_select_layers": (1, 3),
    }


def _qwen21_parts() -> dict[str, Any]:
    tokenizer = chat_tokenizer(8192, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    processor = without_films(Qwen3VLProcessor)
    return {
        "processor": processor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=MESSAGES),
        "text_encoder": _qwen3_vl(tokenizer, Qwen3VLForConditionalGeneration),
        "vae": _autoencoder_qwen21(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    }


# ---------------------------------------------------------------- autoencoders


def _autoencoder_kl(stages: int = 3, **factors: float) -> AutoencoderKL:
    """4 x 4 pixels, or 8 x 8 in four stages, -> 4 channels."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,) * stages,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        norm_num_groups=4,
        latent_channels=4,
        **factors,  # type: ignore[arg-type]
    ).eval()


def _autoencoder_dc() -> AutoencoderDC:
    """4 x 4 pixels -> 4 channels."""
    torch.manual_seed(1)
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        scaling_factor=0.41407,
    ).eval()


def _autoencoder_qwen() -> AutoencoderKLQwenImage:
    """4 x 4 pixels -> 4 channels."""
    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.9, -0.2],
        latents_std=[2.8, 1.4, 0.6, 1.9],
    ).eval()


def _autoencoder_qwen21() -> AutoencoderKLQwenImage21:
    """16 x 16 pixels, with alpha -> 4 channels."""
    torch.manual_seed(1)
    return AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.9, -0.2],
        latents_std=[2.8, 1.4, 0.6, 1.9],
    ).eval()


def _autoencoder_flux2() -> AutoencoderKLFlux2:
    """4 x 4 pixels -> 4 channels; the statistics of its batch norm differ by channel."""
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return vae


# ---------------------------------------------------------------- text encoders


def _clip(kind: type, tokenizer: CLIPTokenizer, width: int, projection: int) -> Any:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LIMIT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def _t5(vocabulary: int) -> T5EncoderModel:
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _gemma(vocabulary: int) -> Gemma2Model:
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        initializer_range=0.1,
        max_position_embeddings=2048,
    )
    return Gemma2Model(config).eval()


def _qwen(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(2)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 24,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    ).eval()


def _qwen3(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """As deep as FLUX.2 klein reads, 27 layers, of which it takes three."""
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


def _qwen3_short(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config).eval()


def _qwen3_vl(tokenizer: Qwen2Tokenizer, kind: type) -> Any:
    torch.manual_seed(2)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 24,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    return kind(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


# ---------------------------------------------------------------- tokenizers


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Words of the prompts are one token each; other text falls back to letters."""
    named = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = _byte_pairs(CLIPTokenizer(), [SHORT, LONG.lower()], named, "</w>")
    return CLIPTokenizer(vocabulary, merges, model_max_length=CLIP_LIMIT)


@cache
def t5_tokenizer(limit: int) -> T5Tokenizer:
    """Like `clip_tokenizer`, made of pieces with scores; ``limit`` is its model_max_length."""
    letters = [chr(code) for code in range(33, 127)]
    words = dict.fromkeys(f"▁{word}" for text in (SHORT, LONG) for word in text.lower().split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -9.0) for letter in letters]
    pieces += [(word, -3.0) for word in words if word != "▁"]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=limit)


@cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Like `clip_tokenizer`; also every word of the pipeline's template is one token."""
    bare: Any = diffusers.QwenImagePipeline(None, None, None, None, None)  # type: ignore[arg-type]
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [bare.prompt_template_encode.format(text) for text in (f"a {SHORT}", LONG)]
    for special in named:
        texts = [part for text in texts for part in text.split(special)]
    vocabulary, merges = _byte_pairs(Qwen2Tokenizer(), texts, named, "")
    tokenizer = Qwen2Tokenizer(vocabulary, merges, model_max_length=1024, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": named[1:]})
    return tokenizer


CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""As Qwen3's: the pipeline asks for an answer without thinking."""


MESSAGES = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}"""
"""As Qwen3-VL's, of messages that are lists of parts."""


@cache
def chat_tokenizer(limit: int = CHAT_LIMIT, *more: str) -> Qwen2Tokenizer:
    """Like `qwen_tokenizer`, with Qwen3's template; at most ``limit`` tokens, ``more`` of them
    special.
    """
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    texts = [SHORT, LONG, "user\n", "assistant\n", "<think>", "</think>", "\n\n"]
    vocabulary, merges = _byte_pairs(Qwen2Tokenizer(), texts, named, "")
    tokenizer = Qwen2Tokenizer(
        vocabulary, merges, model_max_length=limit, padding_side="right", chat_template=CHAT
    )
    tokenizer.add_special_tokens({"additional_special_tokens": named[1:]})
    return tokenizer


@cache
def gemma_tokenizer() -> GemmaTokenizer:
    """Like `clip_tokenizer`; also every word of what pipelines put before a prompt is one token."""
    bare: Any = diffusers.Lumina2Pipeline(None, None, None, None, None)  # type: ignore[arg-type]
    told = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=named + [f"<0x{code:02X}>" for code in range(256)],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    texts = [SHORT, LONG.lower(), *told["complex_human_instruction"].default]
    texts += [f"{bare.system_prompt} <Prompt Start> {prompt}" for prompt in (SHORT, LONG)]
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    return GemmaTokenizer(vocab=bpe["vocab"], merges=merges, add_bos_token=True)


def _byte_pairs(
    like: Any, texts: list[str], named: list[str], end: str
) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges by which every word of ``texts`` is one token.

    Args:
        like: a tokenizer that splits into words as the wanted one does.
        texts: what to learn from.
        named: special tokens, first in the vocabulary.
        end: what a word's last piece ends with.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=end))
    tokenizer.pre_tokenizer = like.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=named + ([letter + end for letter in sorted(alphabet)] if end else []),
        initial_alphabet=alphabet,
        end_of_word_suffix=end,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return bpe["vocab"], [tuple(pair) for pair in bpe["merges"]]
