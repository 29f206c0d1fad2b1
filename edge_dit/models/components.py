"""What a diffusers pipeline folder holds, and which of its files are loaded.

The one place that decides this: what is loaded (`edge_dit.models.pipeline`, `.checkpoint`), what is
checked (`.health`) and what is hashed (`.model`) is the same list of files. Weights are those that
diffusers 0.42 and transformers 5 choose with ``use_safetensors=True``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput
from edge_dit.store.files import open_regular

INDEX_FILE = "model_index.json"
REMEDY = "save or download it again"
LIMIT = 8 * 2**20
"""Largest configuration read, in bytes. Configurations take kilobytes, indices of shards up to a
megabyte."""
LFS = b"version https://git-lfs"
"""How a file begins that git cloned without its content (git-lfs.github.com/spec)."""
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
)
"""Files that hold a vocabulary; a tokenizer of a supported family has one of these sets."""
LOADED = {
    "scheduler",
    "transformer",
    "vae",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    "processor",
    "image_encoder",
    "feature_extractor",
}
"""Components that pipelines of the supported families take; others (safety_checker) are not loaded.
"""
TOKENIZER_FILES = {
    *(name for names in VOCABULARIES for name in names),
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
}
"""Files that transformers' tokenizers read."""
PROCESSOR_FILES = {*TOKENIZER_FILES, "processor_config.json", "preprocessor_config.json"}
"""Files that transformers' processors of text and pictures read."""
MODEL_FILES = {"config.json", "generation_config.json"}
"""Files that a model's class reads besides its weights."""
OTHER_FORMATS = ("bin", "pt", "pth", "ckpt", "msgpack", "h5", "onnx", "gguf", "npz")
"""Suffixes of weights in formats that are not loaded."""
HALF = (".incomplete", ".part", ".aria2", ".crdownload", ".download", ".tmp", ".!qB")
"""What download programs append to the name of a file that is not finished."""


QUANTISED_KEYS = (
    "quantization_config",
    "compression_config",
    "quantization",
    "quantization_method",
)
"""Keys under which configurations say how weights were quantised; "quantization" is MLX's."""
UNQUANTISED = (
    "get the weights that were not quantised, in bfloat16, float16 or float32, from the model's "
    "own repository"
)
DEPTH = re.compile("layers|depth|blocks")
"""Keys of configurations that count layers."""
DEEPEST = 1000
"""Most layers that a configuration may ask for; public models have fewer than a hundred."""


class NoWeights(BadInput):
    """A component without the safetensors weights that would be loaded."""


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that is loaded from a folder of its own.

    Attributes:
        name: in model_index.json, which is also the folder's.
        library: module that has the class ("diffusers", "transformers").
        kind: name of the class.
        folder: with the files.
    """

    name: str
    library: str
    kind: str
    folder: Path

    @property
    def is_tokenizer(self) -> bool:
        """Whether it turns text to tokens, alone or, as a processor, pictures too."""
        return self.is_processor or self.name.startswith("tokenizer")

    @property
    def is_processor(self) -> bool:
        """Whether it is a processor: a tokenizer within."""
        return self.name == "processor"

    @property
    def is_scheduler(self) -> bool:
        """Whether it is the scheduler."""
        return self.name == "scheduler"

    @property
    def is_model(self) -> bool:
        """Whether it has weights."""
        return (self.folder / "config.json").is_file() or self.name.startswith(
            ("transformer", "vae", "text_encoder", "image_encoder")
        )

    def weights(self, variant: str | None = None) -> Weights:
        """Its safetensors weights; see `weights_of`."""
        return weights_of(self.folder, self.library, variant)

    def files(self, variant: str | None = None) -> list[Path]:
        """The files that are loaded, as far as they are there.

        Weights in torch's own format count where there are no others: they are refused, but they
        are what a reader of the folder would load.
        """
        names = [p for p in sorted(self.folder.glob("*")) if not p.is_dir() or p.is_symlink()]
        if self.is_tokenizer:
            read = PROCESSOR_FILES if self.is_processor else TOKENIZER_FILES
            return [p for p in names if p.name in read]
        if self.is_scheduler or not self.is_model:
            return [p for p in names if p.suffix == ".json"]
        found = [p for p in names if p.name in MODEL_FILES]
        try:
            found += self.weights(variant).paths
        except BadInput:
            found += [p for p in names if p.suffix == ".bin" or p.name.endswith(".bin.index.json")]
        return found


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a model.

    Attributes:
        variant: in their names, as diffusers and transformers write it; None without one.
        index: which tensor is in which shard; None for a single file.
        files: single file, or shards by name.
        shard_of: tensor -> its shard, by the index.
    """

    variant: str | None
    index: Path | None
    files: tuple[Path, ...]
    shard_of: dict[str, Path]

    @property
    def paths(self) -> list[Path]:
        """The files and, if there is one, their index."""
        return [*([self.index] if self.index else []), *self.files]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline folder by its model_index.json.

    Attributes:
        folder: with model_index.json.
        variant: of the weights, where a component has it (``variant`` of diffusers).
    """

    folder: Path
    variant: str | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json.

        Raises:
            BadInput: unreadable, or of an unexpected form.
        """
        path = self.folder / INDEX_FILE
        index = read_json(path, "a whole pipeline folder")
        for name, kind in index.items():
            if isinstance(kind, list) and not _is_pair(kind) and not _is_setting(kind):
                raise BadInput(
                    path,
                    found=f"{name} is {kind!r:.80}",
                    expected="a library and a class, or two nulls",
                    remedy=REMEDY,
                )
        return index

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The parts that are loaded, by name. Parts saved as absent are not among them, nor those
        not in `LOADED`.

        Raises:
            BadInput: unreadable model_index.json.
        """
        return tuple(
            Component(name, str(kind[0]), str(kind[1]), self.folder / name)
            for name, kind in sorted(self.index.items())
            if name in LOADED and isinstance(kind, list) and all(kind)
        )

    @property
    def absent(self) -> list[str]:
        """Names of the parts that the pipeline was saved without."""
        return [n for n, kind in self.index.items() if isinstance(kind, list) and not any(kind)]

    def files(self) -> list[Path]:
        """Every file that is loaded and is there, by path; none without model_index.json."""
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return []
        return [path, *(file for part in self.components for file in part.files(self.variant))]


def _is_pair(kind: list[Any]) -> bool:
    texts = all(isinstance(v, str) and v for v in kind)
    return len(kind) == 2 and (texts or kind == [None, None])


def _is_setting(value: list[Any]) -> bool:
    """Whether a list is a setting of a pipeline's class: numbers, no library and class."""
    return bool(value) and all(type(number) in (int, float) for number in value)


def weights_of(folder: Path, library: str, variant: str | None = None) -> Weights:
    """The safetensors files that a model in ``folder`` is loaded from.

    Args:
        folder: of the model.
        library: that loads it; "diffusers" looks for an index first, "transformers" for a file.
        variant: used if there are such weights; else those without a variant are.

    Raises:
        BadInput: no such weights, an unreadable index, or missing shards.
    """
    for chosen in [variant, None] if variant else [None]:
        index, single = (folder / name for name in file_names(library, chosen))
        # a broken link is there: it is named as a broken link, and not passed over
        there = [
            path
            for path in ([index, single] if library == "diffusers" else [single, index])
            if path.is_symlink() or path.exists()
        ]
        if there and there[0] == single:
            return Weights(chosen, None, (single,), {})
        if there:
            shard_of = _read_index(index)
            return Weights(chosen, index, tuple(sorted(set(shard_of.values()))), shard_of)
    raise _no_weights(folder, library, variant)


def file_names(library: str, variant: str | None = None) -> tuple[str, str]:
    """Names of a model's safetensors weights: of an index of shards, and of a single file.

    Args:
        library: that loads the model.
        variant: of the weights.
    """
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    extra = f".{variant}" if variant else ""
    return f"{stem}.safetensors.index{extra}.json", f"{stem}{extra}.safetensors"


def variants_in(folder: Path) -> list[str]:
    """The variants of the safetensors weights in a model's folder, by name."""
    pattern = re.compile(r"(?:diffusion_pytorch_)?model\.(.+?)(?:-\d+-of-\d+)?\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*.safetensors"))
    return sorted({match[1] for match in matches if match})


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor -> shard, by an index of shards, all of which are there."""
    content = read_json(index, "an index of shards")
    named = content.get("weight_map")
    files = list(named.values()) if isinstance(named, dict) else []
    # diffusers reads "metadata" too
    if not files or not all(map(_is_plain, files)) or type(content.get("metadata")) is not dict:
        raise BadInput(
            index,
            found="unreadable (not metadata, and a weight_map from tensors to files beside it)",
            expected="an index of shards",
            remedy=REMEDY,
        )
    shard_of = {name: index.parent / file for name, file in content["weight_map"].items()}
    shards = sorted(set(shard_of.values()))
    absent = [path.name for path in shards if not path.is_symlink() and not path.exists()]
    if absent:
        halves = _halves(index.parent)
        raise BadInput(
            index.parent,
            found=f"{len(absent)} of {len(shards)} shards are missing: {', '.join(absent[:3])}"
            + (f"; a download that was not finished lies there: {halves[0]}" if halves else ""),
            expected=f"every file that {index.name} names",
            remedy="finish the download",
        )
    return shard_of


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and name == Path(name).name


def _halves(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.name.endswith(HALF))


def _no_weights(folder: Path, library: str, variant: str | None) -> NoWeights:
    index, single = file_names(library)
    expected = f"{single}, or shards with {index}"
    variants, halves = variants_in(folder), _halves(folder)
    others = sorted(p for p in folder.glob("*") if p.suffix.lstrip(".").lower() in OTHER_FORMATS)
    named = sorted(path.name for path in folder.glob("*.safetensors"))
    if variants and (variant is None or variant not in variants):
        # fp16 and the like come with every part, others (ema, non_ema) rarely
        return NoWeights(
            folder,
            found=f"no weights without a variant, but of {', '.join(variants)}",
            expected=expected if variant is None else f"weights of variant {variant!r}",
            remedy=f'[model] variant = "{variants[0]}"',
        )
    if halves:
        found, remedy = f"a download that was not finished: {halves[0]}", "finish the download"
    elif any(path.suffix == ".gguf" for path in others):
        path = next(path for path in others if path.suffix == ".gguf")
        found = f"weights in GGUF, which are quantised: {path.name}"
        remedy = UNQUANTISED
    elif others:
        found = f"weights only in another format: {', '.join(p.name for p in others[:3])}"
        remedy = (
            "get this part in safetensors, or load it where it is trusted and write it again: "
            "from_pretrained(FOLDER).save_pretrained(FOLDER) of its class"
        )
    elif any(re.search(r"-\d+-of-\d+", name) for name in named):
        found = f"shards without their index: {', '.join(named[:3])}"
        remedy = f"download {index} too"
    elif named:
        found = f"weights under another name: {', '.join(named[:3])}"
        remedy = "save it with save_pretrained of its class, or download it again"
    else:
        found, remedy = "no weights", REMEDY
    return NoWeights(folder, found=found, expected=expected, remedy=remedy)


def check_folder(part: Component) -> None:
    """Raise `BadInput` unless a component's folder is one that can be read."""
    folder = part.folder
    if folder.is_symlink() and not folder.exists():
        found = f"a link to {folder.readlink()}, which is not there"
    elif not folder.exists():
        found = "no such folder"
    elif not folder.is_dir():
        found = "a file"
    else:
        try:
            found = "" if any(folder.iterdir()) else "an empty folder"
        except OSError as error:
            found = f"cannot be read ({error.strerror or error})"
    if found:
        raise BadInput(
            folder,
            found=found,
            expected=f"the folder of {part.kind}, which {INDEX_FILE} names",
            remedy=REMEDY,
        )


def check_vocabulary(tokenizer: Path) -> None:
    """Raise `BadInput` when a tokenizer's folder holds no vocabulary.

    transformers 5 would silently make a tokenizer of special tokens only
    (tokenization_utils_tokenizers.py).
    """
    if not any(all((tokenizer / name).exists() for name in names) for names in VOCABULARIES):
        raise BadInput(
            tokenizer,
            found="no vocabulary in it",
            expected="one of " + ", ".join(" with ".join(names) for names in VOCABULARIES),
            remedy=REMEDY,
        )


# ---------------------------------------------------------------- reading


def file_fault(path: Path) -> BadInput | None:
    """Why a file cannot be what is loaded, by its first bytes; None if nothing speaks against it.

    Found are: a folder, a broken link, no permission, an empty file, a git-lfs pointer, and the
    mark that a download program leaves beside a file it has not finished.
    """
    if path.is_symlink() and not path.exists():
        return BadInput(
            path,
            found=f"a link to {path.readlink()}, which is not there",
            expected="a file",
            remedy="download the model again, or link to where the file is",
        )
    if not path.exists():
        return BadInput(path, found="no such file", expected="a file", remedy=REMEDY)
    try:
        with open_regular(path) as file:
            start = file.read(len(LFS))
    except OSError as error:
        reason = error.strerror or str(error)
        return BadInput(
            path,
            found=f"cannot be read ({reason})",
            expected="a file that you may read",
            remedy="make it readable (chmod u+r), or download the model again",
        )
    if not start:
        return BadInput(path, found="empty", expected="a whole file", remedy=REMEDY)
    if start == LFS:
        return BadInput(
            path,
            found="a Git LFS pointer instead of the file itself",
            expected="the file itself",
            remedy="git lfs pull, in that clone",
        )
    # aria2 reserves the whole size at once. What other programs leave may be older than the file.
    if (half := path.with_name(f"{path.name}.aria2")).exists():
        return BadInput(
            half,
            found=f"{path.name} beside it was not downloaded to its end",
            expected="whole files",
            remedy="finish the download; if the file is whole, delete the one named here",
        )
    return None


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Args:
        path: of the file.
        expected: what it should be, for the message ("the configuration of a VAE").

    Raises:
        BadInput: missing, unreadable, too large, not in UTF-8, with a byte order mark, not an
            object, or with NaN in it.
    """
    if (fault := file_fault(path)) is not None:
        raise BadInput(
            path, found=f"unreadable ({fault.found})", expected=expected, remedy=fault.remedy
        )
    try:
        with open_regular(path) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ValueError(f"larger than {LIMIT} bytes")
        if data.startswith(b"\xef\xbb\xbf"):
            raise ValueError("a byte order mark, which diffusers does not read")
        value = json.loads(data.decode("utf-8"))  # stock schedulers save -Infinity
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} in place of an object")
        for key, inner in value.items():
            if _has_nan(inner):
                raise ValueError(f"{key} = {inner!r:.80}: a value that is not a number (NaN)")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            path,
            found=f"unreadable ({brief(error)})",
            expected=f"{expected}: a JSON object in UTF-8",
            remedy=REMEDY,
        ) from None
    return value


def check_quantisation(path: Path, config: dict[str, Any]) -> None:
    """Raise `BadInput` when a model's configuration says that its weights are quantised.

    Args:
        path: of the configuration.
        config: read from it; keys of inner configurations count too.
    """
    for key, value in _entries(config):
        if key in QUANTISED_KEYS and value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise BadInput(
                path,
                found=f"a quantised checkpoint: {key} of {method or value!r:.80}",
                expected="a configuration without it",
                remedy=UNQUANTISED,
            )


def check_depth(path: Path, config: dict[str, Any]) -> None:
    """Raise `BadInput` for a number of layers that no model has: building it would never end.

    Args:
        path: of the configuration.
        config: read from it.
    """
    for key, value in _entries(config):
        values = value if isinstance(value, list) else [value]
        counts = [v for v in values if isinstance(v, int)] if DEPTH.search(key) else []
        if len(values) > DEEPEST or any(abs(count) > DEEPEST for count in counts):
            raise BadInput(
                path,
                found=f"{key} = {value!r:.40}",
                expected=f"at most {DEEPEST}",
                remedy=REMEDY,
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a configuration with its value, also of those within it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _has_nan(value: Any) -> bool:
    """Whether a value of a configuration is NaN, or one within it is."""
    if isinstance(value, (dict, list)):
        return any(map(_has_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and isnan(value)


def brief(error: BaseException) -> str:
    """An error of another library in one printable line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = (lines[0] if lines else type(error).__name__)[:160]
    return words if words.isprintable() else ascii(words)


@contextmanager
def refusing(where: object, found: str, expected: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn whatever another library raises into one `BadInput`.

    Its readers raise anything on damaged files: KeyError, struct.error, ZeroDivisionError, and
    PanicException of the tokenizers' Rust code, which is no Exception. Interrupts and a lack of
    memory are not the file's fault and pass.

    Args:
        where: file or folder at fault.
        found: what could not be done with it.
        expected: what it should be.
        remedy: what the user can do.
    """
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        kind = type(error).__name__
        raise BadInput(
            where, found=f"{found}: {kind}: {brief(error)}", expected=expected, remedy=remedy
        ) from None
