"""Speed and memory of every target against torch eager, on random weights of a real configuration.

Every figure comes from a fresh process of its own; ratios compare processes of one run. Peaks are
sampled from outside, anonymous memory and pages of files apart: the latter can be evicted.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.targets import VARIANTS, TargetVariant
from edge_dit.errors import BadInput, CheckFailed, require
from edge_dit.models.public_configs import PublicConfig, public_config
from edge_dit.planning.plan import SCHEMA, Plan, model_of
from edge_dit.store.files import write_atomic, write_json
from edge_dit.text import columns

SAMPLE_SECONDS = 0.03
"""Between two looks at a process's memory."""
WARM_UP = 2
"""Steps that are not timed."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        config: name of a public configuration.
        trained: trained blocks in each of the model's containers.
        tokens: image tokens, a square number.
        text: text tokens.
        rank: of the LoRA.
        steps: timed steps.
        full_lora: measure full LoRA at the configuration's full resolution too.
    """

    config: str
    trained: list[int]
    tokens: int
    text: int
    rank: int = 16
    steps: int = 5
    full_lora: bool = True


CONTENDERS = tuple(execution for execution in VARIANTS if execution.dtype != "float16")
"""What is measured by default."""


def bench(
    case: Case, contenders: Sequence[TargetVariant], work: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; {"case": ..., "rows": [one a contender]}.

    Args:
        case: what to measure.
        contenders: the targets.
        work: folder for the random model and the bundles; those of the same case are kept and used
            again.
        say: prints a line of progress.

    Raises:
        BadInput: sizes that do not fit the configuration.
        CheckFailed: a process failed.
    """
    plan = random_model(case, work)
    write_json(work / "plan.json", plan.model_dump(mode="json"))
    say("eager, the same sub-graph")
    eager = {}
    for dtype in dict.fromkeys(c.dtype for c in contenders):
        reference = _once(work, work / f"reference-{dtype}.json", "reference", [dtype])
        eager[dtype] = {
            **_run(work, "eager", [str(case.steps), dtype]),
            "error": reference["error"],
        }
    full: dict[str, Any] = {}
    if case.full_lora:
        say("eager, full LoRA at full resolution")
        full = _run(work, "full", [json.dumps(asdict(case))])
    rows = []
    for contender in contenders:
        say(f"export {contender}")
        again = "-recompute" if contender.layout == "recompute" else ""
        bundle = work / f"bundle-{contender.target}-{contender.dtype}{again}"
        how = [contender.target, contender.dtype, contender.layout, str(bundle)]
        exported = _once(work, bundle / "export.json", "export", how)
        say(f"train {contender}")
        found = work / f"found-{contender.target}-{contender.layout}-{contender.dtype}"
        arguments = [str(bundle), contender.target, contender.layout, str(case.steps)]
        measured = _run(work, "session", [*arguments, contender.dtype, str(found)])
        base = eager[contender.dtype]
        rows.append(
            {
                **asdict(contender),
                "trained_blocks": sum(case.trained),
                "step_ms": measured["step_ms"],
                "eager_ms": base["step_ms"],
                "ratio_to_eager": measured["step_ms"] / base["step_ms"],
                "full_lora_ms": full.get("step_ms"),
                "ratio_to_full_lora": _ratio(measured["step_ms"], full.get("step_ms")),
                "rss_anon_mb": measured["anon_mb"],
                "rss_file_mb": measured["file_mb"],
                "eager_rss_mb": base["anon_mb"] + base["file_mb"],
                "full_lora_rss_mb": full["anon_mb"] + full["file_mb"] if full else None,
                "artifact_bytes": _bytes(bundle / contender.target),
                "export_s": exported["seconds"],
                "export_rss_mb": exported["anon_mb"] + exported["file_mb"],
                "max_grad_rel_error": _worst(
                    load_file(_reference(work, contender.dtype)), load_file(found)
                ),
                "eager_grad_rel_error": base["error"],
            }
        )
    return {"case": asdict(case), "rows": rows}


METRICS = {
    "step_ms": "step, ms",
    "eager_ms": "eager step, ms",
    "ratio_to_eager": "of eager",
    "ratio_to_full_lora": "of full LoRA",
    "rss_anon_mb": "anonymous, MB",
    "rss_file_mb": "of files, MB",
    "eager_rss_mb": "eager, MB",
    "full_lora_rss_mb": "full LoRA, MB",
    "artifact_bytes": "bundle, bytes",
    "export_s": "export, s",
    "export_rss_mb": "export, MB",
    "max_grad_rel_error": "gradient error",
    "eager_grad_rel_error": "eager, gradient error",
}


def in_words(found: dict[str, Any]) -> list[str]:
    """The rows as a table, one contender a column."""
    rows = found["rows"]
    headings = [str(TargetVariant(r["target"], r["layout"], r["dtype"])) for r in rows]
    return columns(headings, [(n, [_cell(k, r[k]) for r in rows]) for k, n in METRICS.items()])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("grad_rel_error"):
        return f"{value:.1e}"
    return f"{value:.3f}" if key.startswith("ratio") else f"{value:,.0f}"


def _ratio(value: float, base: float | None) -> float | None:
    return None if base is None else value / base


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _worst(want: dict[str, np.ndarray], have: dict[str, np.ndarray]) -> float:
    """Largest difference of a gradient over its largest value."""
    return max(
        float(np.abs(value - have[name]).max() / np.abs(value).max())
        for name, value in want.items()
    )


def _draw(work: Path, dtype: str) -> Path:
    return work / f"draw-{dtype}.safetensors"


def _adapter(work: Path, dtype: str) -> Path:
    return work / f"adapter-{dtype}.safetensors"


def _reference(work: Path, dtype: str) -> Path:
    return work / f"gradients-{dtype}.safetensors"


# ---------------------------------------------------------------- the random model


def random_model(case: Case, work: Path) -> Plan:
    """A pipeline folder ``work/model`` of the case's configuration with as many blocks as are
    trained, random weights, and the plan that trains all of them.
    """
    require("torch", "bench")
    from edge_dit.models.families import FAMILIES, family_of

    public = public_config(case.config)
    family = family_of(public.family)
    config = _shortened(public, case, family)
    side = round(case.tokens**0.5)
    if side * side != case.tokens:
        raise BadInput("--tokens", found=str(case.tokens), expected="a square number")
    model = work / "model"
    if not _same(model / "case.json", asdict(case)):
        _clear(work)
        write_json(model / "model_index.json", {"_class_name": FAMILIES[public.family][0]})
        write_json(model / "scheduler" / "scheduler_config.json", {"num_train_timesteps": 1000})
        write_json(model / "transformer" / "config.json", config)
        random_weights(family, config, model / "transformer")
        write_json(model / "case.json", {k: v for k, v in asdict(case).items() if k in _SHAPES})
    return Plan(
        schema_version=SCHEMA,
        family=public.family,
        model=model.resolve(),
        model_hash="random",
        layers=sum(case.trained),
        head_skip=0,
        tail_skip=0,
        s_min=side * public.multiple,
        s_max=side * public.multiple,
        multiple=public.multiple,
        text_tokens=case.text,
        rank=case.rank,
        alpha=float(case.rank),
        lora_targets=list(family.lora_targets),
        optimizer=AdamW(lr=1e-4),
        steps=case.steps,
        draws=1,
        seed=0,
        targets=["onnx"],
    )


MARKER = ".edge-dit-bench"
"""File by which a folder of ours is known: what lies in it may be removed."""


def _clear(work: Path) -> None:
    """Make ``work`` an empty folder of ours.

    Raises:
        BadInput: it holds something that this command did not make.
    """
    ours = (work / MARKER).is_file()
    if work.exists() and not ours and (not work.is_dir() or any(work.iterdir())):
        raise BadInput(
            work,
            found="already there, and not something this command made",
            expected="a new or empty folder, or one of an earlier bench",
            remedy="choose another --work",
        )
    if ours:
        shutil.rmtree(work)
    write_atomic(work / MARKER, "")


_SHAPES = ("config", "trained", "tokens", "text", "rank")


def _same(path: Path, case: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text()) == {k: v for k, v in case.items() if k in _SHAPES}
    except (OSError, ValueError):
        return False


def _shortened(public: PublicConfig, case: Case, family: Any) -> dict[str, Any]:
    counts = list(family.containers.values())
    if len(case.trained) != len(counts) or sum(case.trained) < 1:
        raise BadInput(
            "--trained",
            found="+".join(map(str, case.trained)),
            expected=f"a number of blocks for each of {', '.join(family.containers)}",
            remedy="e.g. --trained 4+4 for FLUX, --trained 14 for the others",
        )
    lengths = dict(zip(counts, case.trained, strict=True))
    return {"_class_name": family.transformer, **public.config, **lengths}


def random_weights(family: Any, config: dict[str, Any], folder: Path) -> None:
    """One file a block and one for the rest, with the index diffusers writes."""
    import torch

    from edge_dit.models.checkpoint import INDEX, meta_model

    generator = torch.Generator().manual_seed(0)
    groups: dict[str, list[str]] = {}
    state = meta_model(family, config).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    names = family.block_names(config)
    for name in shapes:
        block = next((b for b in names if name.startswith(f"{b}.")), "rest")
        groups.setdefault(block, []).append(name)
    places = {}
    for number, (_, members) in enumerate(groups.items()):
        tensors = {}
        for name in members:
            vector = len(shapes[name]) < 2
            spread = 0.1 if vector else 0.02
            # A norm's weight; not the matrix "norm1.linear.weight", which makes modulations.
            center = 1.0 if vector and "norm" in name and name.endswith("weight") else 0.0
            value = torch.randn(shapes[name], generator=generator) * spread + center
            tensors[name] = value.numpy()
        file = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        places |= dict.fromkeys(members, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})


# ---------------------------------------------------------------- processes


def _once(work: Path, record: Path, kind: str, arguments: list[str]) -> dict[str, Any]:
    """`_run`, or what it found in an earlier run."""
    if not record.is_file():
        facts = _run(work, kind, arguments)
        write_json(record, facts)
    return json.loads(record.read_text())


def _run(work: Path, kind: str, arguments: list[str]) -> dict[str, Any]:
    """A child process's JSON, with its peaks "anon_mb" and "file_mb"."""
    command = [sys.executable, "-m", "edge_dit.app.bench", kind, str(work), *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peaks = {"RssAnon": 0, "RssFile": 0}
    watcher = threading.Thread(target=_watch, args=(child, peaks))
    watcher.start()
    out, err = child.communicate()
    watcher.join()
    if child.returncode != 0:
        last = err.strip().splitlines()[-1:] or ["no message"]
        raise CheckFailed(f"bench {kind}: ended with code {child.returncode}: {last[0]}")
    facts = json.loads(out.strip().splitlines()[-1])
    return {**facts, "anon_mb": peaks["RssAnon"] / 1000, "file_mb": peaks["RssFile"] / 1000}


def _watch(child: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    """Note the peaks of a process, in KiB * 1.024: thousands of bytes."""
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], round(int(rest.split()[0]) * 1.024))
        time.sleep(SAMPLE_SECONDS)


def _timed(step: Callable[[], Any], steps: int) -> float:
    """Median milliseconds of ``step``."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def _child_eager(work: Path, steps: str, dtype: str) -> dict[str, Any]:
    session, _ = _eager(work, dtype)
    arrays = load_file(_draw(work, dtype))
    return {"step_ms": _timed(lambda: session.step(arrays), int(steps))}


def _eager(work: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    """A session of torch with frozen weights as stored in ``dtype``, and a batch of its shapes."""
    from edge_dit.models.quantize import round_frozen
    from edge_dit.reference.eager import EagerSession, adapted_subgraph

    plan = Plan.model_validate_json((work / "plan.json").read_text())
    subgraph, batch = adapted_subgraph(plan, model_of(plan, check=False))
    round_frozen(subgraph, dtype)
    session = EagerSession(subgraph, AdamW(lr=1e-4))
    session.load_adapter(_nonzero(session.adapter()))
    return session, batch


def _child_reference(work: Path, dtype: str) -> dict[str, Any]:
    """Write a draw, an adapter at which its gradients do not jump, and the gradients in float64."""
    from edge_dit.reference.kinks import nudge_from_kinks

    session, batch = _eager(work, dtype)
    draw = _random_draw(batch)
    if nudge_from_kinks(session.subgraph, draw) is None:
        raise CheckFailed("PyTorch's own gradients are too sensitive to rounding to compare")
    save_file(draw, _draw(work, dtype))
    save_file(session.adapter(), _adapter(work, dtype))
    near = _gradients(session, draw)
    session.subgraph.double()
    exact = _gradients(session, {name: _to_double(value) for name, value in draw.items()})
    save_file(exact, _reference(work, dtype))
    return {"error": _worst(exact, near)}


def _gradients(session: Any, draw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session.backward(draw)
    return session.gradients()


def _to_double(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if value.dtype == np.float32 else value


def _random_draw(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """A draw like ``batch``, with random values."""
    kept = ("mask", "rope_cos", "rope_sin", "rope_image", "rope_text")
    rng = np.random.default_rng(0)
    return {
        name: value.numpy()
        if name.endswith(kept)
        else rng.normal(size=tuple(value.shape)).astype(np.float32)
        for name, value in batch.items()
    }


def _nonzero(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.02, value.shape).astype(np.float32) if "lora_B" in name else value
        for name, value in sorted(adapter.items())
    }


def _child_full(work: Path, case_json: str) -> dict[str, Any]:
    """LoRA on every block at full resolution: what users do today."""
    import torch

    from edge_dit.models.checkpoint import build
    from edge_dit.models.families import family_of
    from edge_dit.models.subgraph import add_lora, lora_modules

    case = Case(**json.loads(case_json))
    public = public_config(case.config)
    family = family_of(public.family)
    model: Any = build(family, public.config).eval()
    layers = range(len(family.block_names(public.config)))
    modules = lora_modules(family, model, layers, family.lora_targets)
    add_lora(model, modules, case.rank, float(case.rank), seed=0)
    side = public.resolution // public.multiple
    latents, prompt = family.blank(model, (side, side), case.text)
    latents = torch.randn(latents.shape)
    inputs = family.inputs(model, latents, 500.0, prompt, (side, side))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        found = family.learned(model(**inputs, return_dict=False)[0])
        torch.nn.functional.mse_loss(found, latents).backward()
        optimizer.step()

    return {"step_ms": _timed(step, max(3, case.steps // 2))}


def _child_export(work: Path, target: str, dtype: str, layout: str, bundle: str) -> dict[str, Any]:
    from edge_dit_export.export import export

    plan = Plan.model_validate_json((work / "plan.json").read_text())
    started = time.perf_counter()
    update = {"weights": dtype, "recompute": layout == "recompute"}
    export(plan.model_copy(update=update), Path(bundle), [target], check=False)
    return {"seconds": time.perf_counter() - started}


def _child_session(
    work: Path, bundle: str, target: str, layout: str, steps: str, dtype: str, out: str
) -> dict[str, Any]:
    from edge_dit_runtime.session import open_session

    folder = Path(bundle)
    session = open_session(open_bundle(folder), target, layout)
    arrays = load_file(_draw(work, dtype))
    session.load_adapter(load_file(_adapter(work, dtype)))
    session.backward(arrays)
    save_file(session.gradients(), out)
    return {"step_ms": _timed(lambda: session.step(arrays), int(steps))}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "eager": _child_eager,
    "reference": _child_reference,
    "full": _child_full,
    "export": _child_export,
    "session": _child_session,
}


if __name__ == "__main__":
    _kind, _work, *_rest = sys.argv[1:]
    print(json.dumps(CHILDREN[_kind](Path(_work), *_rest)))
