"""Make samples/tiny-sana: a SANA small enough for a laptop's processor, really trained.

    python samples/make_tiny_sana.py --work DIR [--out samples/tiny-sana]

Stages, each kept in DIR and skipped when already there; a stopped training resumes:

    text           BPE tokenizer of the captions, frozen random Gemma 2 of two layers
    autoencoder    AutoencoderDC, 8x8 pixels -> 8 channels: scenes, textures, photographs
    latents        8,000 captioned scenes, encoded at 128 px, at 64 px, and as 64 px crops of Eq. 1
    transformer    SanaTransformer2DModel, 12 blocks of width 128: 64 px first, then 128 px

About an hour on two idle cores. Needs the extra `host` and scikit-image. The seed fixes everything,
but not to the bit across machines. The folder in the repository differs a little from a fresh run:
its autoencoder was resumed twice, with latent noise 0.08 for the first 2,000 steps and the learning
rate planned for 3,600, then 5,400, finally 4,700 steps.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from scenes import SIDE, draw, random_scene

SEED = 20260320
SCENES = 8_000
TOKENS = 20  # the longest caption has 15
PATCH = 64  # pixels, side of the small training pictures
AUTOENCODER_STEPS = 4_700
TRANSFORMER_STEPS = (2_400, 2_600)  # mostly 64 px, then mostly 128 px


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


# ---------------------------------------------------------------- pictures


def photographs() -> list[np.ndarray]:
    """Pictures that come with scikit-image, uint8 [H, W, 3]."""
    from skimage import data

    names = [
        "astronaut",
        "coffee",
        "chelsea",
        "rocket",
        "retina",
        "immunohistochemistry",
        "hubble_deep_field",
    ]
    pictures = [np.asarray(getattr(data, name)()) for name in names]
    return [*pictures, np.asarray(data.stereo_motorcycle()[0])]


def textures() -> list[np.ndarray]:
    """Grey textures of scikit-image, uint8 [H, W]."""
    from skimage import data

    return [np.asarray(getattr(data, name)()) for name in ("brick", "grass", "gravel", "coins")]


def random_crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of random size and place, mirrored half the time: uint8 [SIDE, SIDE, ...]."""
    high, wide = picture.shape[:2]
    side = int(rng.integers(SIDE, min(high, wide) + 1))
    top, left = rng.integers(0, high - side + 1), rng.integers(0, wide - side + 1)
    square = picture[top : top + side, left : left + side]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    return np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.LANCZOS))


def abstract(rng: np.random.Generator) -> np.ndarray:
    """Noise of a random coarseness over a gradient: uint8 [SIDE, SIDE, 3]."""
    cells = int(2 ** rng.uniform(1, 6))
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    noise = np.asarray(noise.resize((SIDE, SIDE), Image.BICUBIC), np.float32)
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)
    ramp = (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    ends = rng.uniform(0, 256, (2, 3)).astype(np.float32)
    gradient = ends[0] * (1 - ramp) + ends[1] * ramp
    share = rng.uniform(0, 1)
    return (gradient * (1 - share) + noise * share).clip(0, 255).astype(np.uint8)


def tinted(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey levels as a mix of two random colours: uint8 [H, W, 3]."""
    share = grey[..., None].astype(np.float32) / 255
    dark, light = rng.uniform(0, 256, (2, 3))
    return (dark * (1 - share) + light * share).astype(np.uint8)


def mixed_pictures(count: int) -> np.ndarray:
    """What the autoencoder sees: uint8 [count, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(SEED)
    photos, greys = photographs(), textures()
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i in range(count):
        kind = rng.random()
        if kind < 0.5:
            pictures[i] = draw(random_scene(rng), rng, wild=rng.random() < 0.4)
        elif kind < 0.85:
            pictures[i] = random_crop(photos[rng.integers(len(photos))], rng)
        elif kind < 0.92:
            pictures[i] = tinted(random_crop(greys[rng.integers(len(greys))], rng), rng)
        else:
            pictures[i] = abstract(rng)
    return pictures


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def shrink(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 3, side, side], antialiased."""
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


# ---------------------------------------------------------------- training


class Progress:
    """A line every hundred steps: mean loss since the last, seconds a step, minutes to go."""

    def __init__(self, name: str, step: int, steps: int):
        self.name, self.steps, self.losses, self.since = name, steps, [], time.time()

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % 100 == 0 or step == self.steps:
            pace = (time.time() - self.since) / len(self.losses)
            left = pace * (self.steps - step) / 60
            print(
                f"{self.name} {step}/{self.steps}  loss {np.mean(self.losses):.4f}"
                f"  {pace:.2f} s/step  {left:.1f} min to go",
                flush=True,
            )
            self.losses, self.since = [], time.time()


def learning_rate(step: int, steps: int, peak: float, decay: float) -> float:
    """Warm-up over 200 steps, flat, then linearly to 2 % over the last `decay` of the run."""
    return peak * min(1.0, (step + 1) / 200, max(0.02, (steps - step) / (decay * steps)))


def save_checkpoint(path: Path, **state) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def autoencoder_loss(
    vae: AutoencoderDC, pixels: torch.Tensor, noise: torch.Generator
) -> torch.Tensor:
    """L1 at three scales and on edges; latents are held near mean 0, deviation 1 and blurred by a
    little noise, so that neighbouring latents decode to similar pictures. pixels: [N, 3, H, W].
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = vae.encode(pixels).latent.float()
        heard = latent + 0.04 * torch.randn(latent.shape, generator=noise)
        decoded = vae.decode(heard).sample.float()
    loss = F.l1_loss(decoded, pixels)
    for factor in (2, 4):
        loss = loss + F.l1_loss(F.avg_pool2d(decoded, factor), F.avg_pool2d(pixels, factor))
    for dim in (2, 3):
        loss = loss + F.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
    mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    return loss + 0.05 * (mean.square() + (deviation - 1).square()).mean()


def train_autoencoder(work: Path) -> AutoencoderDC:
    """Half of each batch of 16: 64 px crops; the other half: whole pictures shrunk to 64 px."""
    vae = make_autoencoder().to(memory_format=torch.channels_last)
    done = work / "autoencoder.safetensors"
    if done.exists():
        vae.load_state_dict(load_file(done))
        return vae.eval()

    pictures = mixed_pictures(6_000)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    start, checkpoint = 0, work / "autoencoder.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start = state["step"]
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    progress = Progress("autoencoder", start, AUTOENCODER_STEPS)
    for step in range(start, AUTOENCODER_STEPS):
        rng = np.random.default_rng([SEED, step])
        pixels = to_tensor(pictures[rng.integers(0, len(pictures), 16)])
        top, left = rng.integers(0, SIDE - PATCH + 1, 2)
        crops = pixels[:8, :, top : top + PATCH, left : left + PATCH]
        pixels = torch.cat([crops, shrink(pixels[8:], PATCH)])

        rate = learning_rate(step, AUTOENCODER_STEPS, 1.5e-3, 0.6)
        loss = autoencoder_loss(vae, pixels, torch.Generator().manual_seed(step))
        update(optimizer, vae, loss, rate)
        progress.add(step + 1, loss.item())
        if (step + 1) % 500 == 0:
            save_checkpoint(
                checkpoint, step=step + 1, model=vae.state_dict(), optimizer=optimizer.state_dict()
            )
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, done)
    return vae.eval()


def update(optimizer, model: torch.nn.Module, loss: torch.Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


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


@torch.no_grad()
def make_latents(work: Path, vae: AutoencoderDC, tokenizer, text_encoder) -> dict:
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

    rng = np.random.default_rng(SEED + 1)
    captions, parts = [], {"whole": [], "small": [], "crop": [], "crop_side": []}
    begun = time.time()
    for i in range(0, SCENES, 100):
        scenes = [random_scene(rng) for _ in range(100)]
        captions += [scene.caption() for scene in scenes]
        pixels = to_tensor(np.stack([draw(scene, rng) for scene in scenes]))
        crops, sides = [], []
        for picture in pixels:
            sigma = 1 / (1 + np.exp(-rng.normal(0.4, 1.2)))
            side = 8 * round((PATCH + sigma * (SIDE - PATCH)) / 8)
            top, left = rng.integers(0, SIDE - side + 1, 2)
            crops.append(shrink(picture[None, :, top : top + side, left : left + side], PATCH))
            sides.append(side)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts["whole"].append(vae.encode(pixels).latent.float())
            parts["small"].append(vae.encode(shrink(pixels, PATCH)).latent.float())
            parts["crop"].append(vae.encode(torch.cat(crops)).latent.float())
        parts["crop_side"].append(torch.tensor(sides, dtype=torch.float32))
        if (i + 100) % 1000 == 0:
            left_s = (time.time() - begun) / (i + 100) * (SCENES - i - 100)
            print(f"latents {i + 100}/{SCENES}  {left_s / 60:.1f} min to go", flush=True)
    data = {name: torch.cat(tensors) for name, tensors in parts.items()}
    scale = data["whole"].std()
    for name in ("whole", "small", "crop"):
        data[name] = (data[name] / scale).half()

    pipe = SanaPipeline(tokenizer, text_encoder, vae, make_transformer(), make_scheduler())
    plain, plain_mask = encode_captions(pipe, captions[0::2], None)
    told, told_mask = encode_captions(pipe, captions[1::2], instruction())
    empty, empty_mask = encode_captions(pipe, [""], None)
    data |= {
        "text": torch.stack([plain, told], 1).flatten(0, 1),
        "text_mask": torch.stack([plain_mask, told_mask], 1).flatten(0, 1),
        "empty": empty,
        "empty_mask": empty_mask,
        "scale": scale,
    }
    save_file({k: v.contiguous() for k, v in data.items()}, done)
    return data


def flow_batch(data: dict, kind: str, count: int, draw_from: torch.Generator) -> tuple:
    """One training batch of `whole`, `small` or `crop` latents.

    Returns noisy latents [N, 8, h, w], target [N, 8, h, w], sigma [N], text [N, TOKENS, c], mask.
    x = (1 - sigma) * latent + sigma * noise, target = noise - latent, as diffusers trains SANA.
    """
    rows = torch.randint(len(data["whole"]), (count,), generator=draw_from)
    latent = data[kind][rows].float()
    sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(count, generator=draw_from))
    if kind == "crop":  # the crop's side was chosen for its sigma, to within half a step of 8 px
        near = (data["crop_side"][rows] - PATCH) / (SIDE - PATCH)
        sigma = near + (torch.rand(count, generator=draw_from) - 0.5) / 8
        sigma = sigma.abs().clamp(0.002, 0.998)
    noise = torch.randn(latent.shape, generator=draw_from)
    text, mask = data["text"][rows].float(), data["text_mask"][rows]
    dropped = torch.rand(count, generator=draw_from) < 0.1
    text = torch.where(dropped[:, None, None], data["empty"].float(), text)
    mask = torch.where(dropped[:, None], data["empty_mask"], mask)
    level = sigma[:, None, None, None]
    return (1 - level) * latent + level * noise, noise - latent, sigma, text, mask


def batch_kind(step: int, chance: float) -> tuple[str, int]:
    """Which pictures, and how many: 64 px three times in four at first, one time in four later."""
    little = 0.75 if step < TRANSFORMER_STEPS[0] else 0.25
    if chance > little:
        return "whole", 12
    return ("crop" if chance < little / 3 else "small"), 32


def train_transformer(work: Path, data: dict) -> SanaTransformer2DModel:
    """Flow matching; the exponential mean of the weights (over about 500 steps) is what is kept."""
    model = make_transformer().to(memory_format=torch.channels_last)
    mean = copy.deepcopy(model).requires_grad_(False)
    done = work / "transformer.safetensors"
    if done.exists():
        mean.load_state_dict(load_file(done))
        return mean.eval()

    steps = sum(TRANSFORMER_STEPS)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start, checkpoint = 0, work / "transformer.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start = state["step"]
        model.load_state_dict(state["model"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])

    progress = Progress("transformer", start, steps)
    for step in range(start, steps):
        draw_from = torch.Generator().manual_seed(SEED + step)
        kind, count = batch_kind(step, torch.rand((), generator=draw_from).item())
        noisy, target, sigma, text, mask = flow_batch(data, kind, count, draw_from)
        # plain matrix products: the fused attention's backward is slow on short captions
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = model(
                noisy,
                encoder_hidden_states=text,
                encoder_attention_mask=mask.float(),
                timestep=sigma * 1000,
                return_dict=False,
            )[0]
        loss = F.mse_loss(predicted.float(), target)
        update(optimizer, model, loss, learning_rate(step, steps, 1e-3, 0.35))
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - keep)
        progress.add(step + 1, loss.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_checkpoint(
                checkpoint,
                step=step + 1,
                model=model.state_dict(),
                mean=mean.state_dict(),
                optimizer=optimizer.state_dict(),
            )
    save_file({k: v.contiguous() for k, v in mean.state_dict().items()}, done)
    return mean.eval()


# ---------------------------------------------------------------- the folder


def main() -> None:
    torch.set_num_threads(2)
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--out", type=Path, default=here / "tiny-sana")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng(SEED)
    tokenizer = make_tokenizer([random_scene(rng).caption() for _ in range(5_000)])
    text_encoder = make_text_encoder(len(tokenizer))
    vae = train_autoencoder(work)
    data = make_latents(work, vae, tokenizer, text_encoder)
    vae.register_to_config(scaling_factor=1 / data["scale"].item())
    transformer = train_transformer(work, data).to(memory_format=torch.contiguous_format)
    pipe = SanaPipeline(tokenizer, text_encoder, vae, transformer, make_scheduler())
    pipe.save_pretrained(arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
