"""Make samples/tiny-sana: a SANA small enough for a laptop's processor, really trained.

    python samples/make_tiny_sana.py --work DIR [--out samples/tiny-sana] [--begin DIR]

Stages, each kept in DIR and skipped when already there; a stopped training resumes:

    text           BPE tokenizer of the captions, frozen random Gemma 2 of two layers
    autoencoder    AutoencoderDC, 8x8 pixels -> 8 channels: scenes, textures, photographs
    latents        8,000 captioned scenes, encoded at 128 px, at 64 px, and as 64 px crops of Eq. 1
    transformer    SanaTransformer2DModel, 12 blocks of width 128: 64 px first, then 128 px
    sizes          the same, on: pictures of eleven sizes and shapes from 64 to 128 px

About two hours on two idle cores. Needs the extra `host` and scikit-image. The seed fixes
everything, but not to the bit across machines. The folder in the repository differs a little from a
fresh run: its autoencoder was resumed twice, with latent noise 0.08 for the first 2,000 steps and
the learning rate planned for 3,600, then 5,400, finally 4,700 steps. It went through the stage
`sizes` later, on one thread: --begin takes a folder's models for the stages before that.
"""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from scenes import SIDE
from training import (
    LATENTS,
    SEED,
    TRANSFORMER,
    Schedule,
    batch_kind,
    begin_with,
    encoded_scenes,
    mixed_batch,
    noisy_batch,
    picture_loss,
    save_latents,
    save_pipeline,
    sized_batch,
    sized_scenes,
    train,
    vocabulary_captions,
)

SCENES = 8_000
SIZED_SCENES = 2_500  # of each size
TOKENS = 20  # the longest caption has 15
AUTOENCODER_STEPS = 4_700
TRANSFORMER_STEPS = (2_400, 2_600)  # mostly 64 px, then mostly 128 px
SIZED_STEPS = 2_400


# ---------------------------------------------------------------- text


def instruction() -> list[str]:
    """The instruction that `SanaPipeline.__call__` puts before every prompt."""
    signature = inspect.signature(SanaPipeline.__call__)
    return signature.parameters["complex_human_instruction"].default


def make_tokenizer(captions: list[str]) -> GemmaTokenizer:
    """Words of the captions are one token each; other text falls back to pieces, letters, bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=named + [f"<0x{i:02X}>" for i in range(256)],
        initial_alphabet=[chr(i) for i in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions + instruction(), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return GemmaTokenizer(
        vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], add_bos_token=True
    )


def make_text_encoder(vocabulary: int) -> Gemma2Model:
    """Random and frozen. Windows of four tokens and loud word embeddings: a token says its own word
    and a little of the words before it, so "background" knows its colour; no more is needed.
    """
    torch.manual_seed(SEED)
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            query_pre_attn_scalar=24,
            sliding_window=4,
            layer_types=["sliding_attention"] * 2,
            initializer_range=0.1,
            max_position_embeddings=2048,
        )
    )
    with torch.no_grad():
        encoder.embed_tokens.weight.mul_(3)
    return encoder.eval()


# ---------------------------------------------------------------- models


def make_autoencoder() -> AutoencoderDC:
    torch.manual_seed(SEED)
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 64, 128, 128),
        decoder_block_out_channels=(32, 64, 128, 128),
        encoder_layers_per_block=(0, 1, 1, 2),
        decoder_layers_per_block=(0, 1, 2, 2),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )


def make_transformer() -> SanaTransformer2DModel:
    torch.manual_seed(SEED)
    return SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=12,
        num_attention_heads=4,
        attention_head_dim=32,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=96,
        mlp_ratio=2.5,
        sample_size=SIDE // 8,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )


# ---------------------------------------------------------------- training


def train_autoencoder(work: Path) -> AutoencoderDC:
    vae = make_autoencoder().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        """L1 at three scales and on edges; latents are held near mean 0, deviation 1 and blurred by
        a little noise, so that neighbouring latents decode to similar pictures.
        """
        pixels, noise = mixed_batch(step), torch.Generator().manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latent = vae.encode(pixels).latent.float()
            heard = latent + 0.04 * torch.randn(latent.shape, generator=noise)
            decoded = vae.decode(heard).sample.float()
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        held = (mean.square() + (deviation - 1).square()).mean()
        return picture_loss(decoded, pixels) + 0.05 * held

    return train(
        "autoencoder",
        vae,
        loss_at,
        work,
        Schedule(AUTOENCODER_STEPS, peak=1.5e-3, decay=0.6, weight_decay=1e-4, save_every=500),
    )


@torch.no_grad()
def encode_captions(pipe: SanaPipeline, captions: list[str], chi) -> tuple:
    """What the stock pipeline feeds its transformer, cut to the first TOKENS of its 300 tokens: the
    encoder is causal and masked tokens weigh nothing, so the cut changes nothing.

    Returns float16 [N, TOKENS, channels] and the mask, bool [N, TOKENS].
    """
    embeds, masks = [], []
    for i in range(0, len(captions), 100):
        embed, mask, _, _ = pipe.encode_prompt(
            captions[i : i + 100],
            do_classifier_free_guidance=False,
            complex_human_instruction=chi,
            max_sequence_length=TOKENS,
        )
        embeds.append(embed.half())
        masks.append(mask.bool())
    return torch.cat(embeds), torch.cat(masks)


def encode_told_and_plain(pipe: SanaPipeline, captions: list[str]) -> tuple:
    """`encode_captions`, every second one with the pipeline's instruction before it."""
    plain = encode_captions(pipe, captions[0::2], None)
    told = encode_captions(pipe, captions[1::2], instruction())
    return tuple(torch.stack(both, 1).flatten(0, 1) for both in zip(plain, told, strict=True))


@torch.no_grad()
def make_latents(work: Path, pipe: SanaPipeline) -> dict:
    """Scenes as the transformer is trained on them; N scenes:

    whole     [N, 8, 16, 16] at 128 px      small  [N, 8, 8, 8] the same scene at 64 px
    crop      [N, 8, 8, 8] a crop of side `crop_side` pixels (Eq. 1 of the paper), resized to 64 px
    text      [N, TOKENS, channels], every second one with the pipeline's instruction before it
    text_mask [N, TOKENS]; empty [1, TOKENS, channels] and empty_mask: the empty prompt
    scale     the deviation of `whole` before scaling; all latents are divided by it
    """
    done = work / "latents.safetensors"
    if done.exists():
        return load_file(done)

    captions, data = encoded_scenes(SCENES, lambda pixels: pipe.vae.encode(pixels).latent)
    scale = data["whole"].std()
    for name in LATENTS:
        data[name] = (data[name] / scale).half()

    text, text_mask = encode_told_and_plain(pipe, captions)
    empty, empty_mask = encode_captions(pipe, [""], None)
    data |= {
        "text": text,
        "text_mask": text_mask,
        "empty": empty,
        "empty_mask": empty_mask,
        "scale": scale,
    }
    save_latents(data, done)
    return data


@torch.no_grad()
def latents_of(folder: Path, pipe: SanaPipeline) -> dict:
    """Of what `make_latents` makes, what the stage `sizes` needs, where the stages before it are a
    pipeline folder's: scale, empty, empty_mask.
    """
    config = json.loads((folder / "vae" / "config.json").read_text())
    empty, empty_mask = encode_captions(pipe, [""], None)
    scale = torch.tensor(1 / config["scaling_factor"])
    return {"empty": empty, "empty_mask": empty_mask, "scale": scale}


def text_of(data: dict, name: str, rows: torch.Tensor, dropped: torch.Tensor) -> tuple:
    """Text [N, TOKENS, channels] and mask [N, TOKENS] of pictures; those dropped get the empty one.

    name: "" or "<size>." before "text" and "text_mask" in the data.
    """
    text = torch.where(dropped[:, None, None], data["empty"], data[f"{name}text"][rows])
    mask = torch.where(dropped[:, None], data["empty_mask"], data[f"{name}text_mask"][rows])
    return text.float(), mask.float()


def flow_loss(model: SanaTransformer2DModel, batch: tuple, data: dict, name: str) -> torch.Tensor:
    """Flow matching, of a batch as `noisy_batch` gives it; name: as `text_of` takes it."""
    noisy, target, sigma, rows, dropped = batch
    text, mask = text_of(data, name, rows, dropped)
    # plain matrix products: the fused attention's backward is slow on short captions
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        predicted = model(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
    return F.mse_loss(predicted.float(), target)


def train_transformer(work: Path, data: dict) -> SanaTransformer2DModel:
    model = make_transformer().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        draw_from = torch.Generator().manual_seed(SEED + step)
        chance = torch.rand((), generator=draw_from).item()
        kind, count = batch_kind(step, TRANSFORMER_STEPS[0], chance)
        return flow_loss(model, noisy_batch(data, kind, count, draw_from), data, "")

    return train(
        "transformer",
        model,
        loss_at,
        work,
        replace(TRANSFORMER, steps=sum(TRANSFORMER_STEPS)),
    )


@torch.no_grad()
def make_sized_latents(work: Path, pipe: SanaPipeline, data: dict) -> dict:
    """Scenes of the last stage, by "<height>x<width>" of `SIZES`: latents [SIZED_SCENES, 8, h, w],
    "<size>.text" [SIZED_SCENES, TOKENS, channels] and "<size>.text_mask"; "empty" as in ``data``.
    """
    done = work / "sized-latents.safetensors"
    if done.exists():
        return load_file(done)
    captions, sized = sized_scenes(SIZED_SCENES, lambda pixels: pipe.vae.encode(pixels).latent)
    sized = {name: (latents / data["scale"]).half() for name, latents in sized.items()}
    for name, some in captions.items():
        text, mask = encode_told_and_plain(pipe, some)
        sized |= {f"{name}.text": text, f"{name}.text_mask": mask}
    sized |= {name: data[name] for name in ("empty", "empty_mask")}
    save_latents(sized, done)
    return sized


def train_sizes(work: Path, data: dict, model: SanaTransformer2DModel) -> SanaTransformer2DModel:
    model.requires_grad_(True).train()

    def loss_at(step: int) -> torch.Tensor:
        draw_from = torch.Generator().manual_seed(SEED + 500_000 + step)
        name, batch = sized_batch(data, draw_from)
        return flow_loss(model, batch, data, f"{name}.")

    schedule = replace(TRANSFORMER, steps=SIZED_STEPS, peak=6e-4, decay=0.6)
    return train("sizes", model, loss_at, work, schedule)


# ---------------------------------------------------------------- the folder


def main() -> None:
    torch.set_num_threads(2)
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--out", type=Path, default=here / "tiny-sana")
    parser.add_argument("--begin", type=Path, help="a folder whose models are not trained again")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.begin:
        begin_with(arguments.begin, work)

    tokenizer = make_tokenizer(vocabulary_captions())
    text_encoder = make_text_encoder(len(tokenizer))
    vae = train_autoencoder(work)
    pipe = SanaPipeline(tokenizer, text_encoder, vae, make_transformer(), make_scheduler())
    data = latents_of(arguments.begin, pipe) if arguments.begin else make_latents(work, pipe)
    vae.register_to_config(scaling_factor=1 / data["scale"].item())
    transformer = train_transformer(work, data)
    transformer = train_sizes(work, make_sized_latents(work, pipe, data), transformer)
    pipe.transformer = transformer.to(memory_format=torch.contiguous_format)
    save_pipeline(pipe, arguments.out)


if __name__ == "__main__":
    main()
