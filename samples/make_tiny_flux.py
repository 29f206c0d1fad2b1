"""Make samples/tiny-flux: a FLUX small enough for a laptop's processor, really trained.

    python samples/make_tiny_flux.py --work DIR [--out samples/tiny-flux] [--begin DIR] [--now]

Stages, each kept in DIR and skipped when already there; a stopped training resumes:

    text           CLIP and T5 tokenizers of the captions, frozen random encoders of two layers
    autoencoder    AutoencoderKL, 4x4 pixels -> 4 channels: scenes, textures, photographs
    latents        8,000 captioned scenes, encoded at 128 px, at 64 px, and as 64 px crops of Eq. 1
    transformer    FluxTransformer2DModel, 4 + 8 blocks of width 128: 64 px first, then 128 px
    sizes          the same, on: pictures of eleven sizes and shapes from 64 to 128 px
    guidance       the same, distilled from itself to obey `guidance_scale`, as FLUX.1-dev is

--now writes the folder from the last checkpoints; before the last stage it draws at guidance 1
only. Sample with `max_sequence_length=32`, the length of text it was trained on.

About three hours on one core. Needs the extra `host` and scikit-image. The seed fixes
everything, but not to the bit across machines. The folder in the repository differs a little from a
fresh run, because steps were added: the autoencoder's first 1,800 had a learning rate of up to
1.5e-3, planned for 1,800; the transformer's was planned for 2,800 steps until step 2,400, and for
3,000 until step 3,000. It went through the stage `sizes` later, and once more through `guidance`:
--begin takes a folder's models for the stages before these.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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
TOKENS = 32  # `max_sequence_length`; the longest caption has 15
AUTOENCODER_STEPS = 3_000
TRANSFORMER_STEPS = (1_000, 2_600)  # mostly 64 px, then mostly 128 px
SIZED_STEPS = 1_800
GUIDANCE_STEPS = 200


# ---------------------------------------------------------------- text


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Words of the captions are one token each; other text falls back to pieces, letters, bytes."""
    stock = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Random and frozen; the factor makes the pooled vector depend on all words, not on the end
    token alone.
    """
    torch.manual_seed(SEED)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            initializer_factor=10.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return encoder.half().float().eval()


def make_tokenizer_2(captions: list[str]) -> T5Tokenizer:
    """Words of the captions are one token each; other text falls back to letters."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + word, -1.0) for word in words]
    vocab += [(chr(i), -10.0) for i in range(33, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


def make_text_encoder_2(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Random and frozen. Word embeddings are loud, and each head reads one neighbour, so a token
    says its own word and a little of those beside it: "background" knows its colour; no more is
    needed.
    """
    torch.manual_seed(SEED)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        encoder.shared.weight.mul_(2)
        for head, bucket in enumerate((1, 2, 3, 17)):  # one, two, three before; one after
            bias[bucket, head] += 10
    return encoder.half().float().eval()


# ---------------------------------------------------------------- models


def make_autoencoder() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 72),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
    )


def make_transformer() -> FluxTransformer2DModel:
    """Modulations and the last layer start at zero, so every block starts as the identity."""
    torch.manual_seed(SEED)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )
    for name, module in model.named_modules():
        if name == "proj_out" or re.search(r"norm\w*\.linear$", name):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """That of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


# ---------------------------------------------------------------- training


def train_autoencoder(work: Path) -> AutoencoderKL:
    """Every fourth batch is 4 whole pictures, because the norms look at the whole picture."""
    vae = make_autoencoder().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        """The pictures' loss and a little of the divergence from the standard normal:
        it keeps latents near mean 0, deviation 1, and blurred.
        """
        pixels = mixed_batch(step, whole=step % 4 == 0)
        noise = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            heard = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
            decoded = vae.decode(heard).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return picture_loss(decoded, pixels) + 0.002 * divergence

    return train(
        "autoencoder",
        vae,
        loss_at,
        work,
        Schedule(AUTOENCODER_STEPS, peak=8e-4, decay=0.6, weight_decay=1e-4, save_every=300),
    )


@torch.no_grad()
def encode_captions(pipe: FluxPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline feeds its transformer: float16 [N, TOKENS, 96], pooled [N, 64]."""
    texts, pooled = [], []
    for i in range(0, len(captions), 100):
        text, vector, _ = pipe.encode_prompt(captions[i : i + 100], max_sequence_length=TOKENS)
        texts.append(text.half())
        pooled.append(vector.half())
    return torch.cat(texts), torch.cat(pooled)


@torch.no_grad()
def make_latents(work: Path, pipe: FluxPipeline) -> dict:
    """Scenes as the transformer is trained on them; N scenes:

    whole  [N, 4, 32, 32] at 128 px           small  [N, 4, 16, 16] the same scene at 64 px
    crop   [N, 4, 16, 16] a crop of side `crop_side` pixels (Eq. 1 of the paper), resized to 64 px
    text   [N, TOKENS, 96], pooled [N, 64]; empty [1, TOKENS, 96], empty_pooled: the empty prompt
    shift, scale: mean and deviation of `whole`; all latents are (z - shift) / scale
    """
    done = work / "latents.safetensors"
    if done.exists():
        return load_file(done)

    captions, data = encoded_scenes(SCENES, lambda x: pipe.vae.encode(x).latent_dist.mode())
    shift, scale = data["whole"].mean(), data["whole"].std()
    for name in LATENTS:
        data[name] = ((data[name] - shift) / scale).half()
    data["text"], data["pooled"] = encode_captions(pipe, captions)
    data["empty"], data["empty_pooled"] = encode_captions(pipe, [""])
    data |= {"shift": shift, "scale": scale}
    save_latents(data, done)
    return data


@torch.no_grad()
def latents_of(folder: Path, pipe: FluxPipeline) -> dict:
    """Of what `make_latents` makes, what the stages after `transformer` need, where those before
    are a pipeline folder's: shift, scale, empty, empty_pooled.
    """
    config = json.loads((folder / "vae" / "config.json").read_text())
    empty, empty_pooled = encode_captions(pipe, [""])
    shift, scale = config["shift_factor"], 1 / config["scaling_factor"]
    data = {"empty": empty, "empty_pooled": empty_pooled}
    return {**data, "shift": torch.tensor(shift), "scale": torch.tensor(scale)}


@torch.no_grad()
def make_sized_latents(work: Path, pipe: FluxPipeline, data: dict) -> dict:
    """Scenes of the last stages, by "<height>x<width>" of `SIZES`: latents [SIZED_SCENES, 4, h, w],
    "<size>.text" [SIZED_SCENES, TOKENS, 96] and "<size>.pooled"; the empty prompt as in ``data``.
    """
    done = work / "sized-latents.safetensors"
    if done.exists():
        return load_file(done)
    captions, sized = sized_scenes(SIZED_SCENES, lambda x: pipe.vae.encode(x).latent_dist.mode())
    sized = {name: ((z - data["shift"]) / data["scale"]).half() for name, z in sized.items()}
    for name, some in captions.items():
        sized[f"{name}.text"], sized[f"{name}.pooled"] = encode_captions(pipe, some)
    sized |= {name: data[name] for name in ("empty", "empty_pooled")}
    save_latents(sized, done)
    return sized


def pack(latent: torch.Tensor) -> torch.Tensor:
    """[N, 4, h, w] -> [N, h/2 * w/2, 16]."""
    return FluxPipeline._pack_latents(latent, *latent.shape)


def predict(
    model: FluxTransformer2DModel,
    noisy: torch.Tensor,
    grid: tuple[int, int],
    sigma: torch.Tensor,
    guidance: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """The model's velocity for latents of h x w tokens, the grid. noisy: [N, h * w, 16]; sigma,
    guidance: [N]; text: [N, TOKENS, 96]; pooled: [N, 64]. Returns float32 [N, h * w, 16].
    """
    # plain matrix products: the fused attention's backward is slow on short sequences
    kernel = SDPBackend.MATH if noisy.shape[1] < 256 else SDPBackend.FLASH_ATTENTION
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(kernel):
        velocity = model(
            noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=FluxPipeline._prepare_latent_image_ids(1, *grid, "cpu", torch.float32),
            txt_ids=torch.zeros(TOKENS, 3),
            return_dict=False,
        )[0]
    return velocity.float()


def flow_batch(data: dict, step: int, first: int) -> tuple:
    """A batch of a step, see `batch_kind`, as `predict` takes it."""
    draw_from = torch.Generator().manual_seed(SEED + step)
    kind, count = batch_kind(step, first, torch.rand((), generator=draw_from).item())
    return with_text(data, "", noisy_batch(data, kind, count, draw_from))


def sized_flow_batch(data: dict, step: int) -> tuple:
    """A batch of one of `SIZES`, as `predict` takes it."""
    name, batch = sized_batch(data, torch.Generator().manual_seed(SEED + 500_000 + step))
    return with_text(data, f"{name}.", batch)


def with_text(data: dict, name: str, batch: tuple) -> tuple:
    """A batch as `noisy_batch` gives it -> target [N, h * w, 16] and what `predict` takes: packed
    noisy latents, of the same shape, their grid, sigma [N], text [N, TOKENS, 96], pooled [N, 64].

    name: "" or "<size>." before "text" and "pooled" in the data.
    """
    noisy, target, sigma, rows, dropped = batch
    dropped = dropped[:, None]
    text = torch.where(dropped[..., None], data["empty"], data[f"{name}text"][rows]).float()
    pooled = torch.where(dropped, data["empty_pooled"], data[f"{name}pooled"][rows]).float()
    grid = (noisy.shape[2] // 2, noisy.shape[3] // 2)
    return pack(target), (pack(noisy), grid, sigma, text, pooled)


def flow_loss(model: FluxTransformer2DModel, batch: tuple) -> torch.Tensor:
    """Flow matching at guidance 1."""
    target, (noisy, grid, sigma, text, pooled) = batch
    found = predict(model, noisy, grid, sigma, torch.ones_like(sigma), text, pooled)
    return F.mse_loss(found, target)


def train_transformer(work: Path, data: dict) -> FluxTransformer2DModel:
    model = make_transformer()

    def loss_at(step: int) -> torch.Tensor:
        return flow_loss(model, flow_batch(data, step, TRANSFORMER_STEPS[0]))

    schedule = replace(TRANSFORMER, steps=sum(TRANSFORMER_STEPS))
    return train("transformer", model, loss_at, work, schedule)


def train_sizes(work: Path, data: dict, model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    model.requires_grad_(True).train()

    def loss_at(step: int) -> torch.Tensor:
        return flow_loss(model, sized_flow_batch(data, step))

    schedule = replace(TRANSFORMER, steps=SIZED_STEPS, peak=6e-4, decay=0.6)
    return train("sizes", model, loss_at, work, schedule)


def distil_guidance(
    work: Path, data: dict, teacher: FluxTransformer2DModel
) -> FluxTransformer2DModel:
    """One pass with guidance g does what the teacher does in two:
    v = v_empty + g (v_prompt - v_empty), g uniform in [1, 4].
    """
    model = copy.deepcopy(teacher).requires_grad_(True)
    teacher.requires_grad_(False)

    def loss_at(step: int) -> torch.Tensor:
        _, (noisy, grid, sigma, text, pooled) = sized_flow_batch(data, 100_000 + step)
        scale = torch.rand(len(sigma), generator=torch.Generator().manual_seed(step))
        guidance, one = 1 + 3 * scale, torch.ones_like(sigma)
        empty = data["empty"].float().expand_as(text)
        empty_pooled = data["empty_pooled"].float().expand_as(pooled)
        with torch.no_grad():
            prompted = predict(teacher, noisy, grid, sigma, one, text, pooled)
            unprompted = predict(teacher, noisy, grid, sigma, one, empty, empty_pooled)
        target = unprompted + guidance[:, None, None] * (prompted - unprompted)
        return F.mse_loss(predict(model, noisy, grid, sigma, guidance, text, pooled), target)

    return train(
        "guidance",
        model,
        loss_at,
        work,
        Schedule(GUIDANCE_STEPS, peak=6e-4, decay=0.6, weight_decay=0.01, save_every=50),
    )


def last_checkpoint(work: Path) -> FluxTransformer2DModel:
    """Of the last stage begun."""
    model = make_transformer()
    for name in ("guidance", "sizes", "transformer"):
        if (work / f"{name}.safetensors").exists():
            model.load_state_dict(load_file(work / f"{name}.safetensors"))
            break
        if (work / f"{name}.pt").exists():
            model.load_state_dict(torch.load(work / f"{name}.pt")["mean"])
            break
    return model


# ---------------------------------------------------------------- the folder


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--out", type=Path, default=here / "tiny-flux")
    parser.add_argument("--begin", type=Path, help="a folder whose models are not trained again")
    parser.add_argument("--now", action="store_true", help="write the folder from checkpoints")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.begin:
        begin_with(arguments.begin, work)

    captions = vocabulary_captions()
    tokenizer, tokenizer_2 = make_tokenizer(captions), make_tokenizer_2(captions)
    pipe = FluxPipeline(
        make_scheduler(),
        train_autoencoder(work),
        make_text_encoder(tokenizer),
        tokenizer,
        make_text_encoder_2(tokenizer_2),
        tokenizer_2,
        make_transformer(),
    )
    data = latents_of(arguments.begin, pipe) if arguments.begin else make_latents(work, pipe)
    pipe.vae.register_to_config(
        shift_factor=data["shift"].item(), scaling_factor=1 / data["scale"].item()
    )
    if arguments.now:
        pipe.transformer = last_checkpoint(work)
    else:
        sized = make_sized_latents(work, pipe, data)
        transformer = train_sizes(work, sized, train_transformer(work, data))
        pipe.transformer = distil_guidance(work, sized, transformer)
    pipe.vae.to(memory_format=torch.contiguous_format)
    save_pipeline(pipe.to(torch.float16), arguments.out)


if __name__ == "__main__":
    main()
