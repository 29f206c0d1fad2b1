"""Describes any plan, bank, bundle, run, LoRA or folder of pictures in words."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_dit.contract import bank as banks
from edge_dit.contract.adapter import PEFT_CONFIG, LoraFile, read_lora, read_peft
from edge_dit.contract.adapter_formats import FILES
from edge_dit.contract.bundle import ADAPTER, MANIFEST, Bundle, open_bundle
from edge_dit.contract.targets import TARGETS
from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import survey
from edge_dit.pictures.folder import list_folder
from edge_dit.planning.plan import Plan, read_plan


def look(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Describe a file or folder: facts for JSON, and lines for people.

    Raises:
        BadInput: it does not exist, or edge-dit did not make it.
    """
    if path.suffix == ".json" and path.is_file():
        plan = read_plan(path)
        return plan.model_dump(mode="json"), plan_in_words(plan)
    if path.suffix == ".safetensors" and path.is_file():
        return _adapter_in_words(read_lora(path))
    if (path / MANIFEST).is_file():
        bundle = open_bundle(path)
        return bundle.manifest.model_dump(mode="json"), bundle_in_words(bundle)
    if (path / banks.INDEX).is_file():
        index = banks.read_index(path)
        return asdict(index), bank_in_words(path)
    if (path / "run.json").is_file():
        from edge_dit_runtime.run_folder import RunFolder
        from edge_dit_runtime.step_log import read_log

        run, log = RunFolder(path).read(), read_log(path)
        return {**asdict(run), "log": log.summary()}, [
            f"run of target {run.target}: {run.done} of {run.steps} steps",
            f"  bundle {run.bundle}",
            f"  bank   {run.bank}",
            f"  LoRA rank {run.rank}, alpha {run.alpha:g}, for {run.base_model}",
            *(f"  {line}" for line in log.in_words()),
        ]
    if (path / PEFT_CONFIG).is_file():
        return _adapter_in_words(read_peft(path))
    for file in FILES:
        if (path / file).is_file():
            return _adapter_in_words(read_lora(path / file))
    if path.is_dir() and list_folder(path).pictures:
        found = survey(path)
        return found.as_json(), found.in_words()
    raise BadInput(
        path,
        found="nothing edge-dit knows" if path.exists() else "no such file or folder",
        expected="a plan.json, bank, bundle, run, LoRA or folder of pictures",
    )


def plan_in_words(plan: Plan) -> list[str]:
    """A plan as lines for people."""
    rows, columns = plan.grid
    return [
        f"{plan.family}, {plan.layers} blocks ({plan.model_name})",
        f"  train blocks {in_runs(plan.trained)}; skip {plan.head_skip} before, "
        f"{plan.tail_skip} after" + (f" ({plan.tail})" if plan.tail_skip else ""),
        f"  patches {plan.s_min} px ({rows * columns} tokens), "
        + (
            f"windows of pictures of {plan.s_max} px"
            + (", given what is around them" if plan.surroundings else "")
            if plan.window
            else f"cut {plan.s_min}..{plan.s_max} px"
        ),
        f"  text {plan.text_tokens} tokens; LoRA rank {plan.rank}, alpha {plan.alpha:g}",
        f"  {plan.steps} steps, lr {plan.optimizer.lr:g}, {plan.draws} draws, seed {plan.seed}",
        f"  targets {', '.join(plan.targets)}",
    ]


def in_runs(numbers: list[int]) -> str:
    """Ascending numbers as runs: "2..5, 8"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))


def bank_in_words(folder: Path) -> list[str]:
    """A bank as lines for people."""
    index = banks.read_index(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    present = sum(banks.shard_path(folder, s).is_file() for s in range(index.shards))
    state = "complete" if present == index.shards else f"{present} of {index.shards} shards"
    drawn = len({draw.image for draw in index.draws})
    unseen = f" ({drawn} of them drawn)" if drawn < len(index.images) else ""
    return [
        f"bank of {len(index.draws)} draws, {state}, {size / 2**20:.1f} MiB",
        f"  {len(index.images)} images{unseen}, {len(index.prompts)} prompts",
        f"  plan {index.plan_hash[:12]}",
    ]


def bundle_in_words(bundle: Bundle) -> list[str]:
    """A bundle as lines for people."""
    manifest = bundle.manifest
    plan = Plan.model_validate(manifest.plan)
    lines = [f"bundle of {manifest.family}, plan {manifest.plan_hash[:12]}"]
    lines += [f"  {line.strip()}" for line in plan_in_words(plan)[1:-1]]
    for target in manifest.targets:
        size = sum(f.bytes for f in manifest.files if f.path.startswith(f"{target}/"))
        lines.append(f"  {target}: {size / 2**20:.1f} MiB")
        loop = getattr(bundle.facts(target), "loop", None) if target in TARGETS else None
        if loop is not None:
            side = f"paints {loop.painting.side} px" if loop.painting else loop.no_painting
            lines.append(f"  {target}: loop with {len(loop.prompts)} prompts; {side}")
    lora = [t for t in manifest.tensors if t.role == "lora"]
    lines.append(f"  {len(lora)} LoRA tensors in {ADAPTER}")
    return lines


def _adapter_in_words(lora: LoraFile) -> tuple[dict[str, Any], list[str]]:
    facts = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "format": lora.format,
        "tensors": {name: list(value.shape) for name, value in lora.tensors.items()},
    }
    count = sum(value.size for value in lora.tensors.values())
    words = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}: {len(lora.tensors)} tensors, "
    lines = [f"{words}{count:,} values"]
    if lora.format:
        scale = lora.alpha / lora.rank
        lines.append(f"  format {lora.format}; its B holds alpha / rank, {scale:g}")
    return facts, lines
