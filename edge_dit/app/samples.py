"""Pictures of a trained adapter by the stock pipeline that it is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_dit.contract.adapter_formats import DIFFUSERS, format_of
from edge_dit.errors import CheckFailed
from edge_dit.models.model import Model
from edge_dit.store.tensors import TensorFile

FILE = "samples.png"
MOST_PROMPTS, SEEDS = 4, [0, 1]


def write_samples(model: Model, lora: Path, prompts: list[str], side: int, out: Path) -> Path:
    """A contact sheet of an adapter's pictures, by a model's own pipeline (imports torch).

    Args:
        model: that the adapter is used on.
        lora: folder of the adapter.
        prompts: of the pictures; of more than `MOST_PROMPTS` the first ones.
        side: of a picture, in pixels.
        out: folder that gets `FILE`.

    Raises:
        BadInput: the pipeline cannot be loaded.
        CheckFailed: it does not take every tensor of the adapter.
    """
    from edge_dit.models.pipeline import load_pipeline
    from edge_dit.pictures.images import write_picture
    from edge_dit.reference.contact_sheet import contact_sheet

    pipeline = load_pipeline(model.folder, variant=model.variant)
    load_adapter(pipeline, model, lora)
    picture = contact_sheet(
        model.family, pipeline, prompts[:MOST_PROMPTS], SEEDS, side, model.folder.name
    )
    write_picture(out / FILE, picture)
    return out / FILE


def load_adapter(pipeline: Any, model: Model, lora: Path) -> None:
    """Load an adapter into a stock pipeline as its users do, and see that nothing is left out.

    Args:
        pipeline: of the model.
        model: of the pipeline.
        lora: folder of the adapter.

    Raises:
        CheckFailed: the pipeline has fewer or more LoRA tensors than the file.
    """
    form = format_of(model.family.name)
    if form == DIFFUSERS:
        pipeline.load_lora_weights(str(lora))
    else:
        from peft import PeftModel

        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, str(lora))
    stored = len(TensorFile(lora / form.file).header.tensors)
    loaded = sum("lora_" in name for name, _ in pipeline.transformer.named_parameters())
    if stored != loaded:
        raise CheckFailed(
            f"{lora / form.file} has {stored} tensors, {model.folder.name} took {loaded} of them"
        )
