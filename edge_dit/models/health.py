"""Is a pipeline folder what it seems? All that would be loaded is looked at, before any work.

A quantised checkpoint that is read as if its integers were weights, or a missing tensor that a
library fills with random numbers, gives no error later, only a useless adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_dit.errors import BadInput, ManyFaults, raise_any
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.components import (
    INDEX_FILE,
    REMEDY,
    Component,
    Pipeline,
    check_depth,
    check_folder,
    check_quantisation,
    check_vocabulary,
    file_fault,
    read_json,
    refusing,
    variants_in,
)
from edge_dit.models.families import detect, family_of
from edge_dit.models.families.family import NEEDED, Family, scheduler_config
from edge_dit.models.model import Model, open_model
from edge_dit.models.pipeline import class_of, load_part, quiet
from edge_dit.models.weights import (
    Stored,
    extra_fault,
    keep_measured,
    measure,
    misfits,
    missing_fault,
    shape_fault,
    stored_in,
)
from edge_dit.progress import bar

OTHER_PARTS = re.compile(
    r"(.*\.)?(position_ids|inv_freq)|(vision_model|visual_projection|text_projection|logit_scale"
    r"|lm_head|decoder|shared|encoder\.embed_tokens|embed_tokens)(\..*)?"
)
"""Stored tensors of a text encoder that its class need not have: buffers that old versions of
transformers saved, and the rest of a larger model of which it is the encoder."""
QUANTISED_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
    "hf_quant_config.json": "ModelOpt",
    "quant_strategy.json": "a mixed precision",
}
"""Files that quantisers leave beside the weights."""
BIG = 2**30
"""Bytes of weights from which a progress bar is worth it."""
PROBE = "a photo of a dog"


def model_faults(folder: Path, variant: str | None = None) -> list[BadInput]:
    """Everything that is wrong with a pipeline folder, for all components that will be loaded.

    All weights are read once; what was found is remembered while the files stay the same.

    Args:
        folder: of the pipeline.
        variant: of the weights, see `open_model`.
    """
    stored = Pipeline(folder, variant)
    try:
        family = detect(folder)
        parts = stored.components
    except BadInput as fault:
        return [fault]  # nothing can be said of what it names
    faults = _index_faults(stored, family_of(family))
    if "transformer" not in {part.name for part in parts}:
        with _collecting(faults):
            open_model(folder, variant)
    for part in parts:
        with _collecting(faults), refusing(part.folder, "of unexpected form", part.kind):
            _check(part, stored)
    if not faults:
        with _collecting(faults):
            _check_whole(open_model(folder, variant))
    _collect_content(faults, parts, variant)
    return faults


@contextmanager
def _collecting(faults: list[BadInput]) -> Iterator[None]:
    """Add what is raised to ``faults``."""
    try:
        yield
    except ManyFaults as many:
        faults += many.faults
    except BadInput as fault:
        faults.append(fault)


def _index_faults(stored: Pipeline, family: Family) -> list[BadInput]:
    """What is wrong with model_index.json as a whole, and with the variant that is asked for."""
    faults = []
    path = stored.folder / INDEX_FILE
    names = {part.name for part in stored.components}
    if absent := sorted({*NEEDED, family.tokenizer, *family.needs} - names):
        faults.append(
            BadInput(
                path,
                found=f"no {', no '.join(absent)}",
                expected="all components of the pipeline",
                remedy=REMEDY,
            )
        )
    with _collecting(faults):
        check_quantisation(path, stored.index)
    models = [part for part in stored.components if part.is_model]
    if stored.variant and not any(stored.variant in variants_in(p.folder) for p in models):
        known = sorted({name for part in models for name in variants_in(part.folder)})
        faults.append(
            BadInput(
                stored.folder,
                found=f"no component has weights of variant {stored.variant!r}",
                expected=f"one of {', '.join(known)}" if known else "weights of that variant",
                remedy=f'[model] variant = "{known[0]}"' if known else "leave [model] variant out",
            )
        )
    return faults


# ---------------------------------------------------------------- components


def _check(part: Component, stored: Pipeline) -> None:
    """Raise `BadInput` for what is wrong with a component, as far as no weights need be read."""
    check_folder(part)
    wrong = [fault for file in part.files(stored.variant) if (fault := file_fault(file))]
    raise_any(part.folder, wrong)
    if part.is_tokenizer:
        _check_tokenizer(part, stored)
    elif part.is_model:
        _check_weights(part, stored)
    else:
        if part.name == "scheduler":
            family_of(detect(stored.folder)).objective(scheduler_config(stored.folder))
        load_part(part)


def _check_weights(part: Component, stored: Pipeline) -> None:
    path = part.folder / "config.json"
    config = read_json(path, f"the configuration of {part.kind}")
    check_quantisation(path, config)
    named = str(config.get("_class_name", part.kind))
    family = family_of(detect(stored.folder))
    same = {family.transformer, *family.aliases}  # diffusers builds one class for all of them
    if named != part.kind and not {named, part.kind} <= same:
        raise BadInput(
            path,
            found=f"class {named!r:.80}",
            expected=f"{part.kind}, which {INDEX_FILE} names",
            remedy=REMEDY,
        )
    if (generation := part.folder / "generation_config.json").exists():
        read_json(generation, "settings of text generation")
    for name, label in QUANTISED_FILES.items():
        if (part.folder / name).exists():
            check_quantisation(part.folder / name, {"quantization": label})
    check_depth(path, config)
    tensors = stored_in(part.weights(stored.variant))
    if part.name == "transformer":
        model = open_model(stored.folder, stored.variant)
        Checkpoint(model.family, part.folder, model.config, stored.variant)
    elif part.library == "diffusers":
        if part.name == "vae":
            family_of(detect(stored.folder)).vae_config(stored.folder)
        raise_any(part.folder, _misfits_of_diffusers(part, config, tensors))
    else:
        raise_any(part.folder, _misfits_of_transformers(part, tensors, stored.variant))


def _misfits_of_diffusers(
    part: Component, config: dict[str, Any], tensors: Mapping[str, Stored]
) -> list[BadInput]:
    """What does not fit between the tensors of an autoencoder and its configuration."""
    kind = class_of(part)
    path = part.folder / "config.json"
    with quiet(), refusing(path, "diffusers cannot build it", part.kind):
        with torch.device("meta"):
            model = kind.from_config(config)
        # Names of attention layers as diffusers wrote them before 0.16: it renames them on loading.
        named = {name: name for name in tensors}
        model._fix_state_dict_keys_on_load(named)
    renamed = {name: tensors[old] for name, old in named.items()}
    return misfits(renamed, model.state_dict(), part.folder)


def _misfits_of_transformers(
    part: Component, tensors: Mapping[str, Stored], variant: str | None
) -> list[BadInput]:
    """What transformers itself finds when it loads a text encoder to the meta device."""
    _, info = load_part(
        part,
        variant=part.weights(variant).variant,
        use_safetensors=True,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    faults = []
    if missing := sorted(info["missing_keys"]):
        faults.append(missing_fault(missing, 0, part.folder))
    extra = sorted(n for n in info["unexpected_keys"] if not OTHER_PARTS.fullmatch(n))
    if extra:
        file = tensors[extra[0]].file if extra[0] in tensors else part.folder
        faults.append(extra_fault(extra, file))
    for name, stored, expected in sorted(info["mismatched_keys"], key=lambda found: found[0])[:1]:
        first = next(iter(tensors.values()))
        tensor = tensors.get(name, Stored(first.file, tuple(stored), first.dtype))
        faults.append(shape_fault(name, tensor, tuple(expected)))
    return faults


def _check_tokenizer(part: Component, stored: Pipeline) -> None:
    check_vocabulary(part.folder)
    for path in part.files():
        if path.suffix == ".json" and path.name != "tokenizer.json":
            read_json(path, "a part of a tokenizer")
    try:
        tokenizer = load_part(part)
        tokenizer = tokenizer.tokenizer if part.is_processor else tokenizer
    except BadInput as fault:
        raise BadInput(
            _vocabulary(part), found=fault.found, expected="a vocabulary", remedy=REMEDY
        ) from None
    with refusing(_vocabulary(part), "it cannot split a text into tokens", "a vocabulary"):
        words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
        # padded as pipelines do it
        ids = tokenizer(PROBE, padding="max_length", max_length=16, truncation=True).input_ids
        largest = max(tokenizer.get_vocab().values(), default=0)
        known = [number for number in ids if number not in tokenizer.all_special_ids]
    limit = tokenizer.model_max_length
    if type(limit) not in (int, float) or not limit >= 1:
        raise BadInput(
            part.folder / "tokenizer_config.json",
            found=f"model_max_length = {limit!r:.40}",
            expected="a number of tokens",
            remedy=REMEDY,
        )
    if not words or not known:
        raise BadInput(
            _vocabulary(part),
            found=f"no token for any part of {PROBE!r}" if words else "a vocabulary without words",
            expected="a trained vocabulary",
            remedy=REMEDY,
        )
    encoder = (
        "text_encoder" if part.is_processor else part.name.replace("tokenizer", "text_encoder")
    )
    rows = _vocabulary_size(stored.folder / encoder)
    if rows is not None and largest >= rows:
        raise BadInput(
            _vocabulary(part),
            found=f"a token of number {largest}",
            expected=f"numbers below {rows}, the vocabulary of its text encoder",
            remedy="get tokenizer and text encoder of one and the same model",
        )


def _vocabulary(part: Component) -> Path:
    """The file of a tokenizer that is most likely at fault."""
    names = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
    return next((part.folder / n for n in names if (part.folder / n).exists()), part.folder)


def _vocabulary_size(encoder: Path) -> int | None:
    """Rows of a text encoder's embedding, by its configuration; None where that does not say."""
    try:
        config = read_json(encoder / "config.json", "a text encoder")
    except BadInput:
        return None  # it is a fault of its own
    inner = config.get("text_config")
    for found in (config, inner if isinstance(inner, dict) else {}):
        if type(size := found.get("vocab_size")) is int:
            return size
    return None


# ---------------------------------------------------------------- the whole


def _check_whole(model: Model) -> None:
    """Raise `BadInput` where components do not fit each other or the family."""
    expected = f"a pipeline of {model.family.name}"
    vae = model.folder / "vae" / "config.json"
    with refusing(vae, "unexpected values", expected):
        _ = model.multiple
    path = model.folder / "transformer" / "config.json"
    with refusing(path, "its transformer cannot run", expected):
        _run_on_meta(model)
    channels = read_json(vae, "an autoencoder")
    latents = channels.get("latent_channels", channels.get("z_dim"))
    taken = model.config.get("in_channels")
    packed = model.family.packed
    if type(latents) is int and taken != latents * packed:
        raise BadInput(
            path,
            found=f"in_channels = {taken}",
            expected=f"{latents * packed}, by the autoencoder's configuration",
            remedy="get transformer and autoencoder of one and the same model",
        )
    for key, parts in model.family.text_widths.items():
        _check_width(model, key, parts)


def _run_on_meta(model: Model) -> None:
    """Run the transformer without values: a configuration that contradicts itself raises here."""
    family, grid = model.family, (1, 1)  # no table of positions is smaller
    transformer = model.meta()
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), family.traceable(), torch.no_grad():
        latents, prompt = family.blank(transformer, grid, 8)
        inputs = family.inputs(transformer, latents, 500.0, prompt, grid)
        state, cond = family.begin(transformer, inputs)
        for name, block in family.blocks(transformer).items():
            state = family.run_block(name, block, state, cond, grid)
        family.head(transformer, state.image, cond, grid)


def _check_width(model: Model, key: str, parts: tuple[str, ...]) -> None:
    """Raise `BadInput` unless text encoders give what the transformer takes.

    Args:
        model: opened.
        key: of the width in the transformer's configuration.
        parts: text encoders whose outputs, side by side, have this width.
    """
    if not all((model.folder / part).is_dir() for part in parts):
        return  # saved without it
    width = 0
    for part in parts:
        config = read_json(model.folder / part / "config.json", "a text encoder")
        inner = config.get("text_config")
        text = {**config, **inner} if isinstance(inner, dict) else config
        projects = len(parts) > 1  # Stable Diffusion 3 joins the projections of two CLIPs
        size = text.get("projection_dim") if projects else None
        size = size or text.get("d_model") or text.get("hidden_size")
        if type(size) is not int:
            return
        width += size
    if width != model.config.get(key):
        raise BadInput(
            model.folder / "transformer" / "config.json",
            found=f"{key} = {model.config.get(key)}",
            expected=f"{width}, by {' and '.join(parts)}",
            remedy="get transformer and text encoders of one and the same model",
        )


def _collect_content(
    faults: list[BadInput], parts: Iterable[Component], variant: str | None
) -> None:
    """Read all weights and add those that are not finite."""
    files = []
    for part in parts:
        if part.is_model and not any(str(part.folder) in fault.where for fault in faults):
            files += part.weights(variant).files
    total = sum(path.stat().st_size for path in files)
    shown = bar("weights read (GiB)", round(total / BIG)) if total >= BIG else nullcontext()
    with shown as advance:
        for path in files:
            with _collecting(faults):
                _check_finite(path)
            if advance is not None:
                advance(path.stat().st_size / BIG, path.name)
    keep_measured()


def _check_finite(path: Path) -> None:
    if name := measure(path).not_finite:
        raise BadInput(
            path,
            found=f"values of {name} are not finite (NaN or infinite)",
            expected="finite weights",
            remedy="download it again; if that does not help, get the weights in bfloat16 or "
            "float32: a conversion to float16 overflowed",
        )
