"""What `edge-dit bench` runs in child processes, each in a fresh one.

    python -m edge_dit.app.bench.child < task.json

Standard input is one task, a JSON object whose "kind" says which (`read_task`). The last line of
standard output is one JSON object: the numbers that the task's `run` returns. A fault of the input
is one line on standard error and exit code 2; a check that does not hold the same with code 1.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.numpy import load_file, save_file

from edge_dit.app.bench.loop_tasks import LoopExport, LoopStage
from edge_dit.app.bench.model import MODEL, Case
from edge_dit.contract.adamw import AdamW
from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.targets import RECOMPUTE, WIDE, TargetVariant
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.models.public_configs import public_config
from edge_dit.planning.plan import Plan, model_of
from edge_dit.store.documents import STRICT

WARM_UP = 2
"""Steps before the timed ones."""
Arrays = dict[str, np.ndarray]


# ---------------------------------------------------------------- files of the work folder


def plan_file(work: Path) -> Path:
    """The plan of the random model."""
    return work / "plan.json"


def draw_file(work: Path, dtype: str) -> Path:
    """The draw that every process trains on where frozen weights are stored as ``dtype``."""
    return work / f"draw-{dtype}.safetensors"


def adapter_file(work: Path, dtype: str) -> Path:
    """The LoRA at which gradients are compared."""
    return work / f"adapter-{dtype}.safetensors"


def exact_gradients_file(work: Path, dtype: str) -> Path:
    """Gradients of that draw at that LoRA, computed in float64."""
    return work / f"gradients-{dtype}.safetensors"


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class ReferenceTask:
    """Write a draw, a LoRA at which its gradients do not jump, and its gradients in float64.

    Attributes:
        work: folder of the bench, with the plan in it.
        dtype: how frozen weights are stored: as `TargetVariant.stored` says.
    """

    __pydantic_config__ = STRICT
    work: Path
    dtype: str
    kind: Literal["reference"] = "reference"

    def run(self) -> dict[str, float]:
        """{"error": largest relative error of eager float32 gradients}

        Raises:
            CheckFailed: no LoRA was found at which rounding does not decide the gradients.
        """
        from edge_dit.reference.kinks import nudge_from_kinks

        session, batch = _eager_session(self.work, self.dtype)
        draw = _random_draw(batch)
        if nudge_from_kinks(session.subgraph, draw) is None:
            raise CheckFailed("PyTorch's own gradients are too sensitive to rounding to compare")
        save_file(draw, draw_file(self.work, self.dtype))
        save_file(session.adapter(), adapter_file(self.work, self.dtype))
        session.backward(draw)
        rounded = session.gradients()
        session.subgraph.double()
        session.backward({name: _to_double(value) for name, value in draw.items()})
        exact = session.gradients()
        save_file(exact, exact_gradients_file(self.work, self.dtype))
        return {"error": largest_error(exact, rounded)}


@dataclass(frozen=True)
class TorchTask:
    """Time torch on the trained blocks. A `ReferenceTask` of float32 must have run before.

    Attributes:
        work: folder of the bench.
        steps: timed steps.
        bf16: whether forward and backward pass run in ``torch.autocast`` to bfloat16. LoRA,
            optimizer and loss stay in float32.
        compiled: whether the sub-graph goes through ``torch.compile``.
    """

    __pydantic_config__ = STRICT
    work: Path
    steps: int
    bf16: bool = False
    compiled: bool = False
    kind: Literal["torch"] = "torch"

    def run(self) -> dict[str, float]:
        """{"step_ms": median milliseconds of a step, "error": largest relative error of a gradient}

        Raises:
            CheckFailed: torch cannot compile here.
        """
        import torch

        session, _ = _eager_session(self.work, WIDE)
        session.load_adapter(load_file(adapter_file(self.work, WIDE)))
        draw = load_file(draw_file(self.work, WIDE))
        if self.compiled:
            session.subgraph.compile()

        def backward() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                session.backward(draw)

        def step() -> None:
            backward()
            session.update()

        try:
            backward()
        except Exception as error:  # the compiler's errors have no common base
            if not self.compiled:
                raise
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise CheckFailed(f"torch.compile: {reason:.200}") from None
        exact = load_file(exact_gradients_file(self.work, WIDE))
        error = largest_error(exact, session.gradients())
        return {"step_ms": _median_ms(step, self.steps), "error": error}


@dataclass(frozen=True)
class FullLoraTask:
    """Time torch eager with LoRA on every block at full resolution: what users do today.

    Attributes:
        case: of the bench; the model has all blocks of its configuration.
        bf16: whether it runs in ``torch.autocast`` to bfloat16, and keeps only the states between
            blocks (gradient checkpointing).
    """

    __pydantic_config__ = STRICT
    case: Case
    bf16: bool = False
    kind: Literal["full"] = "full"

    def run(self) -> dict[str, float]:
        """{"step_ms": median milliseconds of a step, of half as many steps, at least 3}"""
        import torch

        from edge_dit.models.checkpoint import build
        from edge_dit.models.families import family_of
        from edge_dit.models.subgraph import add_lora, lora_modules

        case = self.case
        public = public_config(case.config)
        family = family_of(public.family)
        model: Any = build(family, public.config)
        layers = range(len(family.block_names(public.config)))
        modules = lora_modules(family, model, layers, family.lora_targets)
        add_lora(model, modules, case.rank, float(case.rank), seed=0)
        if self.bf16:
            model.enable_gradient_checkpointing()
        side = public.resolution // public.multiple
        latents, prompt = family.blank(model, (side, side), case.text)
        latents = torch.randn(latents.shape)
        inputs = family.inputs(model, latents, 500.0, prompt, (side, side))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                predicted = family.learned(family.forward(model, inputs))
            torch.nn.functional.mse_loss(predicted.float(), latents).backward()
            optimizer.step()

        return {"step_ms": _median_ms(step, max(3, case.steps // 2))}


@dataclass(frozen=True)
class ExportTask:
    """Export the trained blocks for one target.

    Attributes:
        work: folder of the bench.
        variant: target, layout and dtype.
        bundle: where the bundle goes.
    """

    __pydantic_config__ = STRICT
    work: Path
    variant: TargetVariant
    bundle: Path
    kind: Literal["export"] = "export"

    def run(self) -> dict[str, float]:
        """{"seconds": of the export, without starting Python}"""
        from edge_dit_export.export import export

        recompute = self.variant.layout == RECOMPUTE
        variant = self.variant
        choices = {"weights": variant.dtype, "compute": variant.compute, "recompute": recompute}
        plan = _read_plan(self.work).model_copy(update=choices)
        started = time.perf_counter()
        export(plan, self.bundle, [self.variant.target], check=False)
        return {"seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class SessionTask:
    """Write one target's gradients, then time its steps. A `ReferenceTask` must have run before.

    Attributes:
        work: folder of the bench.
        variant: target, layout and dtype.
        bundle: made by an `ExportTask`.
        steps: timed steps.
        gradients: safetensors file that the gradients go to, float32 by LoRA name.
    """

    __pydantic_config__ = STRICT
    work: Path
    variant: TargetVariant
    bundle: Path
    steps: int
    gradients: Path
    kind: Literal["session"] = "session"

    def run(self) -> dict[str, float]:
        """{"step_ms": median milliseconds of a step, "read_mb": MB read from storage in one}"""
        from edge_dit_runtime.session import open_session

        variant = self.variant
        session = open_session(open_bundle(self.bundle), variant.target, variant.layout)
        draw = load_file(draw_file(self.work, variant.stored))
        session.load_adapter(load_file(adapter_file(self.work, variant.stored)))
        session.backward(draw)
        save_file(session.gradients(), self.gradients)
        for _ in range(WARM_UP):
            session.step(draw)
        before = bytes_read()
        step_ms = _median_ms(lambda: session.step(draw), self.steps, warm_up=0)
        return {"step_ms": step_ms, "read_mb": (bytes_read() - before) / self.steps / 1e6}


@dataclass(frozen=True)
class ProfileTask:
    """Time the operators of an onnx variant. A `ReferenceTask` must have run before.

    Attributes:
        work: folder of the bench.
        variant: of plain ONNX.
        bundle: made by an `ExportTask`.
        steps: profiled ones, after `WARM_UP` others.
    """

    __pydantic_config__ = STRICT
    work: Path
    variant: TargetVariant
    bundle: Path
    steps: int
    kind: Literal["profile"] = "profile"

    def run(self) -> dict[str, float]:
        """{"<operator>.calls": a step, "<operator>.ms": milliseconds a step}"""
        from edge_dit_runtime.session import open_session
        from edge_dit_runtime.sessions.ort import profiling

        variant = self.variant
        with tempfile.TemporaryDirectory() as folder:
            with profiling(Path(folder)):
                session = open_session(open_bundle(self.bundle), variant.target, variant.layout)
            draw = load_file(draw_file(self.work, variant.stored))
            for _ in range(WARM_UP + self.steps):
                session.step(draw)
            del session
            gc.collect()  # a session writes its profile when it ends
            return operators(Path(folder), self.steps)


def operators(folder: Path, steps: int) -> dict[str, float]:
    """Numbers of `ProfileTask` from the profiles that onnxruntime wrote into a folder.

    Args:
        folder: a profile for each session.
        steps: timed ones; each profile has as many runs in every step, after `WARM_UP` others.
    """
    found: defaultdict[str, float] = defaultdict(float)
    for path in folder.iterdir():
        events = json.loads(path.read_text())
        runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
        if not runs:
            continue
        first = runs[len(runs) * WARM_UP // (WARM_UP + steps)]
        for event in events:
            timed = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if timed and event["ts"] >= first:
                name = event["args"]["op_name"]
                found[f"{name}.calls"] += 1
                found[f"{name}.ms"] += event["dur"] / 1000
    return {name: value / steps for name, value in found.items()}


Task = (
    ReferenceTask
    | TorchTask
    | FullLoraTask
    | ExportTask
    | SessionTask
    | ProfileTask
    | LoopExport
    | LoopStage
)
TASK: TypeAdapter[Task] = TypeAdapter(Annotated[Task, Field(discriminator="kind")])
"""A task from and to JSON."""


def read_task(text: str) -> Task:
    """The task of a JSON object.

    Raises:
        BadInput: not JSON, an unknown kind, or attributes that are missing, unknown or wrong.
    """
    try:
        return TASK.validate_json(text)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise BadInput(
            "bench.child",
            found="; ".join(
                f"{'.'.join(map(str, f['loc'])) or 'task'}: {f['msg']}" for f in faults
            ),
            expected="one task as a JSON object on standard input",
            remedy="run edge-dit bench, which writes the tasks",
        ) from None


# ---------------------------------------------------------------- what tasks share


def largest_error(exact: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Largest difference of a tensor over its largest value, of all tensors."""
    return max(
        float(np.abs(value - other[name]).max() / np.abs(value).max())
        for name, value in exact.items()
    )


def bytes_read() -> int:
    """Bytes that this process has had read from storage; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def _median_ms(step: Callable[[], Any], steps: int, warm_up: int = WARM_UP) -> float:
    """Median milliseconds of ``step``, after ``warm_up`` calls that do not count."""
    for _ in range(warm_up):
        step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def _read_plan(work: Path) -> Plan:
    plan = Plan.model_validate_json(plan_file(work).read_text("utf-8"))
    return plan.model_copy(update={"model": (work / MODEL).resolve()})


def _eager_session(work: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    """A session of torch with frozen weights rounded to ``dtype``, and a batch of its shapes."""
    from edge_dit.models.quantize import round_subgraph
    from edge_dit.reference.eager import EagerSession, adapted_subgraph

    plan = _read_plan(work)
    subgraph, batch = adapted_subgraph(plan, model_of(plan, check=False))
    round_subgraph(subgraph, dtype)
    session = EagerSession(subgraph, AdamW(lr=1e-4))
    session.load_adapter(with_random_b(session.adapter()))
    return session, batch


def _random_draw(batch: Mapping[str, Any]) -> Arrays:
    """A draw of the batch's shapes: random values, but for masks and positions."""
    kept = ("mask", "rope_cos", "rope_sin", "rope_image", "rope_text")
    rng = np.random.default_rng(0)
    return {
        name: value.numpy()
        if name.endswith(kept)
        else rng.normal(size=tuple(value.shape)).astype(np.float32)
        for name, value in batch.items()
    }


def _to_double(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if value.dtype == np.float32 else value


def main() -> None:
    """Run the task on standard input."""
    try:
        numbers = read_task(sys.stdin.read()).run()
    except (BadInput, CheckFailed) as error:
        # One line, because the parent shows the last one: warnings may stand before it.
        print("; ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(1 if isinstance(error, CheckFailed) else 2)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
