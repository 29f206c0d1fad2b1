"""A checkpoint in one .safetensors file, as its authors publish it -> a diffusers folder.

diffusers' `from_single_file` converts the tensors. Such a file holds the transformer, sometimes the
autoencoder and the text encoders too, never configurations or tokenizers. These, and the parts that
it lacks, come from a pipeline in diffusers format: the job's [model] config, or the repository that
diffusers names for this kind of checkpoint. The folder that is made stays in edge-dit's cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput, require
from edge_dit.models.components import INDEX_FILE, read_json
from edge_dit.models.families import detect
from edge_dit.models.hub import PLAIN, download, gaps_of, parts_of
from edge_dit.models.pipeline import quiet
from edge_dit.progress import bar
from edge_dit.store.files import cache_folder, sha256, whole_folder

LORA = re.compile(r"\.(lora_[AB]|lora_down|lora_up|lora\.down|lora\.up)\b|^lora_")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
PRECISE = {"F64", "F32", "F16", "BF16"}
INTEGERS = {"I64", "I32", "BOOL"}
"""Dtypes of positions and flags. Smaller integers and float8 are quantised weights, whose scales
diffusers would not apply.
"""
ENCODERS = ("text_encoders.clip_l.", "text_encoders.clip_g.", "text_encoders.t5xxl.")
AUTOENCODER = ("vae.", "first_stage_model.")
"""How the tensors of text encoders and autoencoder begin (diffusers, single_file_utils.py)."""
CONFIG = 'set [model] config = "..." to the diffusers folder or hub id that it was made from'


@dataclass(frozen=True)
class _File:
    """A file's header: tensor -> dtype and shape."""

    path: Path
    tensors: dict[str, tuple[str, list[int]]]

    @cached_property
    def repository(self) -> str | None:
        """The repository that diffusers takes configurations from; None if it knows none.

        diffusers takes everything unknown for Stable Diffusion 1, which no family supports.
        """
        import torch
        from diffusers.loaders.single_file_utils import (
            CHECKPOINT_KEY_NAMES,
            fetch_diffusers_config,
        )

        known = [CHECKPOINT_KEY_NAMES[kind] for kind in ("flux", "sd3", "sd35_large", "sana")]
        marks = {key for keys in known for key in ([keys] if isinstance(keys, str) else keys)}
        if not marks & self.tensors.keys():
            return None
        shapes = {n: torch.empty(s, device="meta") for n, (_, s) in self.tensors.items()}
        return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]

    @cached_property
    def prefixes(self) -> dict[str, tuple[str, ...]]:
        """Part that the file holds -> how its tensors begin; those of a transformer vary."""
        clip, big_clip, t5 = ENCODERS
        flux = any("double_blocks." in name for name in self.tensors)
        parts = {"vae": AUTOENCODER, "text_encoder": (clip,)}
        parts |= {"text_encoder_2": (t5,) if flux else (big_clip,)}
        parts |= {} if flux else {"text_encoder_3": (t5,)}
        held = {k: p for k, p in parts.items() if any(n.startswith(p) for n in self.tensors)}
        return {"transformer": (), **held}

    def dtype(self, part: str) -> Any:
        """The dtype that a part is stored in; float32 where it is stored in several."""
        import torch

        own, others = self.prefixes[part], (*ENCODERS, *AUTOENCODER)
        kinds = {
            dtype
            for name, (dtype, _) in self.tensors.items()
            if dtype in PRECISE and (name.startswith(own) if own else not name.startswith(others))
        }
        names = {"F16": torch.float16, "BF16": torch.bfloat16}
        return names.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def convert(path: Path, config: Path | str | None = None) -> Path:
    """The diffusers folder of a checkpoint in one file; made once, then taken from the cache.

    Weights keep their dtype. Making it takes memory for one part of the pipeline at a time, the
    transformer being the largest, and as much storage as the parts that the file holds.

    Args:
        path: the .safetensors file.
        config: diffusers folder or hub id with configurations, tokenizers and parts that the file
            lacks; default the repository that diffusers names.

    Raises:
        BadInput: not a checkpoint that diffusers converts; quantised; or ``config`` is needed, does
            not fit, or cannot be had.
    """
    require("torch", "reading a model")
    require("diffusers", "reading a model")
    file = _read(path)
    if config is None and (config := file.repository) is None:
        raise BadInput(
            path,
            found="no checkpoint that diffusers tells by its tensors as one of a supported family",
            expected="a transformer of FLUX.1, Stable Diffusion 3 or SANA as their authors publish",
            remedy=f"give a folder in diffusers format, or {CONFIG}",
        )
    rest = _rest(file, config)
    detect(rest)
    parts = parts_of(rest)
    held = [part for part in parts if part in file.prefixes]
    if lacking := [gap for gap in gaps_of(rest) if gap.split("/")[0] not in held]:
        raise BadInput(
            path,
            found=f"no {', '.join(gap.split('/')[0] for gap in lacking)} in it, and none in {rest}",
            expected="configurations, tokenizers and all parts that the file lacks, in one folder",
            remedy=CONFIG,
        )
    target = cache_folder() / "converted" / f"{path.stem}-{_key(path, rest, held)[:16]}"
    if not (target / INDEX_FILE).is_file():
        with (
            whole_folder(target, INDEX_FILE) as building,
            bar(f"convert {path.name}", len(parts)) as on,
        ):
            for part in parts:
                if part in held:
                    _convert(file, rest, part).save_pretrained(building / part)
                else:
                    _take(rest / part, building / part)
                on(note=part)
            shutil.copyfile(rest / INDEX_FILE, building / INDEX_FILE)
    return target


def _read(path: Path) -> _File:
    """The header of a file, if its tensors can be a checkpoint.

    Raises:
        BadInput: damaged, a shard, an adapter, or quantised.
    """
    from safetensors import SafetensorError, safe_open

    if SHARD.search(path.name):
        raise BadInput(
            path,
            found="one shard of several",
            expected="a whole checkpoint",
            remedy="give the folder of the whole pipeline in diffusers format",
        )
    try:
        with safe_open(path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            tensors = {n: (one.get_dtype(), list(one.get_shape())) for n, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(
            path, found=f"damaged ({error})", expected="safetensors", remedy="download it again"
        ) from None
    if any(LORA.search(name) for name in tensors):
        raise BadInput(
            path,
            found="an adapter (LoRA), not a model",
            expected="a whole checkpoint",
            remedy="give the model that the adapter is for",
        )
    coarse = sorted({dtype for dtype, _ in tensors.values()} - PRECISE - INTEGERS)
    if coarse:
        raise BadInput(
            path,
            found=f"weights in {', '.join(coarse)}: a quantised checkpoint",
            expected="float32, float16 or bfloat16",
            remedy="get the same model in bfloat16 or float16",
        )
    return _File(path, tensors)


def _rest(file: _File, config: Path | str) -> Path:
    """The diffusers folder that has what the file lacks.

    Raises:
        BadInput: it cannot be had; the message says that the file needs it.
    """
    if isinstance(config, Path):
        return config
    try:
        return download(config, without=file.prefixes)
    except BadInput as fault:
        raise BadInput(
            file.path,
            found=f"a checkpoint without configurations and tokenizers; diffusers has them in "
            f"{config}, which cannot be had: {fault.found}",
            expected="that repository in the hub's cache, or access to it",
            remedy=f"{fault.remedy}; or {CONFIG}",
        ) from None


def _key(path: Path, rest: Path, held: list[str]) -> str:
    """SHA-256 over all files that the folder is made from, hexadecimal."""
    digest = hashlib.sha256(sha256(path).encode())
    for file in sorted(_used(rest, held)):
        digest.update(f"{file.relative_to(rest)} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _used(rest: Path, held: list[str]) -> list[Path]:
    """Files of ``rest`` that go into the folder: of held parts the configuration only."""
    parts = [rest / part for part in parts_of(rest)]
    files = [rest / INDEX_FILE]
    for part in parts:
        files += [part / "config.json"] if part.name in held else _plain(part)
    return [file for file in files if file.is_file()]


def _plain(part: Path) -> list[Path]:
    """Files of a part that are loaded: no .bin, no other formats."""
    return [file for kind in (*PLAIN, "*.safetensors") for file in part.glob(kind)]


def _take(part: Path, target: Path) -> None:
    """Copy a part; weights as a second name of the same file where the file system can."""
    target.mkdir()
    for file in _plain(part):
        source = file.resolve()  # the hub's cache holds links
        try:
            os.link(source, target / file.name)
        except OSError:
            shutil.copyfile(source, target / file.name)


def _convert(file: _File, rest: Path, part: str) -> Any:
    """A part with the file's weights.

    Raises:
        BadInput: diffusers does not convert it, or its configuration does not fit.
    """
    index = read_json(rest / INDEX_FILE, "a diffusers pipeline")
    library, name = index[part]
    options: dict[str, Any] = {"config": str(rest), "local_files_only": True}
    with quiet():
        import diffusers
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        # diffusers converts text encoders only as parts of a pipeline
        converter = getattr(diffusers, name if library == "diffusers" else index["_class_name"])
        if not hasattr(converter, "from_single_file"):
            raise _unknown(file, f"diffusers converts no single files to {converter.__name__}")
        if library == "diffusers":
            options["subfolder"] = part
        else:
            options |= dict.fromkeys(other for other in parts_of(rest) if other != part)
        try:
            made = converter.from_single_file(
                str(file.path), torch_dtype=file.dtype(part), **options
            )
        except (
            *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
            SingleFileComponentError,
        ) as error:
            raise _unknown(file, f"its {part} does not fit {rest.name}: {error!r:.300}") from None
    model = made if library == "diffusers" else getattr(made, part)
    if library == "transformers":
        model.tie_weights()  # a tensor with two names is stored under one of them
    lost = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lost:
        raise _unknown(file, f"{len(lost)} tensors of its {part} are missing, first {lost[0]}")
    return model


def _unknown(file: _File, found: str) -> BadInput:
    return BadInput(
        file.path,
        found=found,
        expected="a checkpoint of the family and size that the configuration says",
        remedy=f"{CONFIG}; or give the whole model in diffusers format",
    )
