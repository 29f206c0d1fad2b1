"""Opens a bundle: picks the session of a target and layout."""

from __future__ import annotations

from pathlib import Path

from edge_dit.contract.bundle import Manifest, check_has_target
from edge_dit.errors import BadInput
from edge_dit_runtime.sessions.trainer import Session

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
        from edge_dit_runtime.sessions.streamed import streamed_session

        return streamed_session(bundle, manifest)
    if target == "onnx":
        from edge_dit_runtime.sessions.onnx import onnx_session

        step = TRAIN_STEP if (layout or there[0]) == "fused" else RECOMPUTE
        return onnx_session(bundle, manifest, step)
    if target == "ort-training":
        from edge_dit_runtime.sessions.ort_training import OrtTrainingSession

        return OrtTrainingSession(bundle, manifest)
    from edge_dit_runtime.sessions.executorch import executorch_session

    return executorch_session(bundle, manifest)
