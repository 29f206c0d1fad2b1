"""The formats in which a LoRA leaves edge-dit: one record a format, those of each family.

Readers disagree on where they look for alpha. diffusers reads the header entry
``lora_adapter_metadata``, PEFT its adapter_config.json, ComfyUI and kohya-ss's programs a tensor
``<name>.alpha``. A reader that finds none applies B A as it is (diffusers 0.42,
utils/peft_utils.py, get_peft_kwargs; ComfyUI, comfy/weight_adapter/lora.py,
LoRAAdapter.calculate_weight). So every format holds B times alpha / rank, and says alpha = rank
where its reader looks: the strength is the same by each of these rules, and without any. What the
LoRA was trained with stays in the header, in an entry of our own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_dit.contract.adapter_names import FLUX, FLUX2, SD3, Blocks, Lora, in_native
from edge_dit.errors import BadInput

PREFIX = "transformer."
"""Prefix of LoRA names in diffusers. Without it nothing loads, and diffusers only warns."""
METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps a LoraConfig."""
NOTE = "edge_dit"
"""Header entry of exported files: format, and rank and alpha of the training, as JSON."""


@dataclass(frozen=True)
class Format:
    """How a LoRA file is named, what its tensors are called, and how it is loaded.

    Attributes:
        name: as in ``--format``.
        file: its file in the adapter folder, which also tells what made the folder.
        load: how to load it: a line of Python, or words. ``{folder!r}`` and ``{file!r}`` are paths.
        prefix: what names begin with.
        dot: what stands for a dot in the name of a module.
        parts: what A and B are called.
        alpha: whether each module has a tensor ``.alpha``, float32 without axes.
        blocks: names of the app, where they are not diffusers'.
    """

    name: str
    file: str
    load: str
    prefix: str
    dot: str = "."
    parts: tuple[str, str] = ("lora_A", "lora_B")
    alpha: bool = False
    blocks: Blocks | None = None


DIFFUSERS = Format(
    "diffusers",
    "pytorch_lora_weights.safetensors",
    "pipe.load_lora_weights({folder!r})",
    PREFIX,
)
PEFT = Format(
    "peft",
    "adapter_model.safetensors",
    "from peft import PeftModel; "
    "pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {folder!r})",
    "base_model.model.",
)
COMFYUI = Format(
    "comfyui",
    "lora_comfyui.safetensors",
    "copy {file!r} into ComfyUI/models/loras and choose it in a node LoraLoaderModelOnly",
    PREFIX,
    alpha=True,
)


def _kohya(program: str, blocks: Blocks | None) -> Format:
    return Format(
        "kohya",
        "lora_kohya.safetensors",
        f"pass {{file!r}} to {program}, or to an app that reads files of kohya-ss's trainers",
        "lora_unet_",
        dot="_",
        parts=("lora_down", "lora_up"),
        alpha=True,
        blocks=blocks,
    )


# ComfyUI names Qwen-Image's weights as diffusers does, and takes either prefix. diffusers reads the
# file too, but puts "transformer." in front of a "transformer." that is there
# (loaders/lora_conversion_utils.py, _convert_non_diffusers_qwen_lora_to_diffusers).
_QWEN_COMFYUI = replace(COMFYUI, prefix="diffusion_model.")
# The authors' names are also those that diffusers converts, if they begin so
# (_convert_non_diffusers_flux2_lora_to_diffusers).
_FLUX2_COMFYUI = replace(COMFYUI, prefix="diffusion_model.", alpha=False, blocks=FLUX2)
_SD_SCRIPTS = "--lora_weights of kohya-ss/sd-scripts' {}_minimal_inference.py"
_MUSUBI = "--lora_weight of kohya-ss/musubi-tuner's qwen_image_generate_image.py"

FORMATS = {
    "sana": (DIFFUSERS, PEFT),
    "flux": (DIFFUSERS, PEFT, COMFYUI, _kohya(_SD_SCRIPTS.format("flux"), FLUX)),
    "sd3": (DIFFUSERS, PEFT, COMFYUI, _kohya(_SD_SCRIPTS.format("sd3"), SD3)),
    "pixart": (PEFT, COMFYUI),
    "qwen_image": (DIFFUSERS, PEFT, _QWEN_COMFYUI, _kohya(_MUSUBI, None)),
    "lumina2": (DIFFUSERS, PEFT),
    "chroma": (DIFFUSERS, PEFT, COMFYUI),
    "flux2": (DIFFUSERS, PEFT, _FLUX2_COMFYUI),
    "z_image": (DIFFUSERS, PEFT),
    "krea2": (DIFFUSERS, PEFT),
    "qwen_image21": (DIFFUSERS, PEFT),
}
"""Family -> its formats, the default first.

ComfyUI has FLUX, SD3, PixArt and Qwen-Image (comfy/lora.py, model_lora_keys_unet), no SANA. Its
Chroma is a kind of FLUX (comfy/model_base.py, Chroma), of FLUX.2 it has the authors' names.
kohya-ss/sd-scripts trains FLUX and SD3 (networks/lora_flux.py, lora_sd3.py), kohya-ss/musubi-tuner
Qwen-Image (src/musubi_tuner/networks/lora_qwen_image.py). PixArtSigmaPipeline has no
``load_lora_weights``.
"""
FILES = tuple(dict.fromkeys(form.file for forms in FORMATS.values() for form in forms))
NAMES = tuple(dict.fromkeys(form.name for forms in FORMATS.values() for form in forms))


def format_of(family: str, name: str | None = None) -> Format:
    """A format of ``family``, by default that of its stock pipeline.

    Raises:
        BadInput: no format of that name, or not for this family.
    """
    forms = FORMATS.get(family, ())
    for form in forms:
        if name in (None, form.name):
            return form
    raise BadInput(
        "--format",
        found=f"no format {name!r:.40}"
        if name not in NAMES
        else f"{name} has no names for the family {family}",
        expected=f"one of {', '.join(form.name for form in forms)}" if forms else "",
    )


def lora_config(names: Iterable[str], rank: int, alpha: float) -> dict[str, object]:
    """The PEFT LoraConfig of an adapter, with only those keys that every PEFT version knows.

    Args:
        names: LoRA tensors by diffusers name.
        rank: r.
        alpha: lora_alpha; the scale is alpha / r.
    """
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({_module(name) for name in names}),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def header(names: Iterable[str], rank: int, alpha: float) -> dict[str, str]:
    """The safetensors header entries by which diffusers restores rank and alpha."""
    config = {f"{PREFIX}{k}": v for k, v in lora_config(names, rank, alpha).items()}
    return {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)}


def exported_header(form: Format, names: Iterable[str], rank: int, alpha: float) -> dict[str, str]:
    """Header entries of an exported file.

    Args:
        form: its format.
        names: LoRA tensors by diffusers name.
        rank: of the training.
        alpha: of the training; the file's tensors hold it already.
    """
    note = json.dumps({"format": form.name, "rank": rank, "alpha": alpha}, sort_keys=True)
    entries = header(names, rank, float(rank)) if form.name == DIFFUSERS.name else {"format": "pt"}
    return {**entries, NOTE: note}


def exported(
    form: Format, tensors: Mapping[str, np.ndarray], rank: int, alpha: float
) -> dict[str, np.ndarray]:
    """The tensors of an exported file: alpha / rank in B, names as its readers look for them.

    Args:
        form: its format.
        tensors: by diffusers name, float32, as trained.
        rank: of every module.
        alpha: the change of a weight is alpha / rank * B A.

    Raises:
        BadInput: LoRA that is not whole, a module without a name in this format, or an alpha with
            which B is no longer finite.
    """
    modules = _modules(tensors, rank)
    if alpha != rank:
        scale = alpha / rank
        modules = {name: Lora(lora.a, _times(lora.b, scale)) for name, lora in modules.items()}
    if not all(np.isfinite(lora.b).all() for lora in modules.values()):
        raise BadInput(
            "alpha",
            found=f"{alpha:g} with rank {rank}: alpha / rank * B is not finite in float32",
            remedy="train with a smaller alpha",
        )
    if form.blocks is not None:
        modules = in_native(modules, form.blocks)
    named: dict[str, np.ndarray] = {}
    for module, lora in modules.items():
        key = form.prefix + module.replace(".", form.dot)
        named |= {f"{key}.{form.parts[0]}.weight": lora.a, f"{key}.{form.parts[1]}.weight": lora.b}
        if form.alpha:
            named[f"{key}.alpha"] = np.array(len(lora.a), np.float32)
    return named


def _times(b: np.ndarray, scale: float) -> np.ndarray:
    """``b * scale``, rounded once."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return (b.astype(np.float64) * scale).astype(np.float32)


def _module(name: str) -> str:
    """The module that a LoRA tensor belongs to."""
    return name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]


def _modules(tensors: Mapping[str, np.ndarray], rank: int) -> dict[str, Lora]:
    """LoRA by module.

    Raises:
        BadInput: A or B is missing, or of another rank.
    """
    modules = {}
    for module in dict.fromkeys(map(_module, tensors)):
        a, b = (tensors.get(f"{PREFIX}{module}.lora_{part}.weight") for part in "AB")
        if a is None or b is None or len(a) != rank or b.shape[1] != rank:
            shapes = [None if value is None else value.shape for value in (a, b)]
            raise BadInput(
                module,
                found=f"lora_A of shape {shapes[0]}, lora_B of shape {shapes[1]}",
                expected=f"both, of rank {rank}",
            )
        modules[module] = Lora(a, b)
    return modules
