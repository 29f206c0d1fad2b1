"""What a loaded bundle can do, whatever its target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_dit.bundle import Manifest, check_has_target
from edge_dit.errors import BadInput

Tensors = dict[str, np.ndarray]


class Trainer(Protocol):
    """A train step with its adapter; what parity compares.

    Tensors are float32 numpy arrays; LoRA tensors go by their diffusers names, as in
    adapter.safetensors.
    """

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients. ``draw`` holds the batch tensors of the manifest
        by name. Does not change the adapter.
        """
        ...

    def update(self) -> None:
        """One AdamW step (`edge_dit.adamw`) with the gradients of the last `backward`."""
        ...

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward` then `update`; the loss before the update."""
        ...

    def gradients(self) -> Tensors:
        """Gradients of the last `backward`, before clipping, by LoRA name. Valid until `update`."""
        ...

    def adapter(self) -> Tensors:
        """A copy of the LoRA tensors."""
        ...

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors; the optimiser state is kept."""
        ...


class Session(Trainer, Protocol):
    """A loaded bundle: a trainer whose learning rate can be set, and whose state can be kept."""

    lr: float
    """Learning rate of the updates to come; at first the manifest's."""

    def state_dict(self) -> Tensors:
        """Everything a resumed run needs to go on bit for bit: "adapter.<name>", "exp_avg.<name>",
        "exp_avg_sq.<name>" and "step" (int64, [1]: updates done).
        """
        ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state_dict`."""
        ...


TRAIN_STEP = "train_step.onnx"
RECOMPUTE = "train_step.recompute.onnx"
LAYOUTS = ("fused", "recompute", "streamed")
"""Of the onnx target: one graph for the whole step; the same, computing each block again for its
gradients; or one graph per kind of block.
"""


def layouts(manifest: Manifest, target: str) -> list[str]:
    """The layouts of a bundle's target, the default first."""
    facts = manifest.targets[target]
    has = {"fused": target != "onnx" or TRAIN_STEP in facts["graphs"]}
    has["recompute"] = target == "onnx" and RECOMPUTE in facts["graphs"]
    has["streamed"] = "streamed" in facts
    return [layout for layout in LAYOUTS if has[layout]]


def titled(manifest: Manifest, target: str, layout: str) -> str:
    """A target and layout as a certificate lists them: "onnx", "onnx (streamed)"."""
    return target if layout == layouts(manifest, target)[0] else f"{target} ({layout})"


def open_session(
    bundle: Path, manifest: Manifest, target: str, layout: str | None = None
) -> Session:
    """Load ``target`` of a bundle.

    Args:
        bundle: its folder.
        manifest: its manifest.
        target: one of its targets.
        layout: one of `layouts`; default the first.

    Raises:
        BadInput: the bundle lacks the target or layout, or the target's runtime is not installed.
    """
    check_has_target(bundle, manifest, target)
    there = layouts(manifest, target)
    if layout not in (None, *there):
        raise BadInput(
            bundle,
            found=f"no layout {layout!r} of target {target}",
            expected=" or ".join(there),
            remedy="choose another --layout, or export with other [export] weights",
        )
    if (layout or there[0]) == "streamed":
        from edge_dit_runtime.streamed_session import streamed_session

        return streamed_session(bundle, manifest)
    if target == "onnx":
        from edge_dit_runtime.onnx_session import onnx_session

        step = TRAIN_STEP if (layout or there[0]) == "fused" else RECOMPUTE
        return onnx_session(bundle, manifest, step)
    if target == "ort-training":
        from edge_dit_runtime.ort_training_session import OrtTrainingSession

        return OrtTrainingSession(bundle, manifest)
    from edge_dit_runtime.executorch_session import executorch_session

    return executorch_session(bundle, manifest)
