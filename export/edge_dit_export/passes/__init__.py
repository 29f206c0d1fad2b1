"""Rewrites of a traced train step, one a file, and the order each target needs them in.

Each module is named for what it does, and holds one function of that name. `_graph` has what they
share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from edge_dit_export.passes._graph import propagate, rehome, sweep
from edge_dit_export.passes.bmm_of_one_to_mm import bmm_of_one_to_mm
from edge_dit_export.passes.conv1x1_to_mm import conv1x1_to_mm
from edge_dit_export.passes.depthwise_backward_to_conv import depthwise_backward_to_conv
from edge_dit_export.passes.float_scalars import float_scalars
from edge_dit_export.passes.merge_shape_ops import merge_shape_ops
from edge_dit_export.passes.negative_pad_to_slice import negative_pad_to_slice
from edge_dit_export.passes.raise_frozen_gemm import raise_frozen_gemm
from edge_dit_export.passes.relu_gradient_to_product import relu_gradient_to_product
from edge_dit_export.passes.remove_units import remove_units
from edge_dit_export.passes.rotations_to_mm import rotations_to_mm
from edge_dit_export.passes.safe_softmax_to_softmax import safe_softmax_to_softmax
from edge_dit_export.passes.share_shape_ops import share_shape_ops
from edge_dit_export.passes.slice_scatter_to_pad import slice_scatter_to_pad
from edge_dit_export.passes.tokens_last import tokens_last
from edge_dit_export.passes.view_frozen import view_frozen

Pass = Callable[[fx.GraphModule], int]

_FOR_BOTH: tuple[Pass, ...] = (
    rotations_to_mm,
    conv1x1_to_mm,
    depthwise_backward_to_conv,
    bmm_of_one_to_mm,
    negative_pad_to_slice,
    slice_scatter_to_pad,
    safe_softmax_to_softmax,
    remove_units,
    tokens_last,
    merge_shape_ops,
    share_shape_ops,
)

FOR_ONNX: tuple[Pass, ...] = (relu_gradient_to_product, *_FOR_BOTH)
"""Rewrites for the plain ONNX step. Shape operations come last, because the others add some."""

FOR_FORWARD: tuple[Pass, ...] = (
    bmm_of_one_to_mm,
    safe_softmax_to_softmax,
    remove_units,
    merge_shape_ops,
    share_shape_ops,
)
"""Rewrites for an ONNX graph without a backward pass."""

FOR_STORED_WEIGHTS: tuple[Pass, ...] = (*FOR_ONNX, view_frozen)
"""Rewrites for an ONNX graph whose frozen weights are in a file of their own."""

FOR_EXECUTORCH: tuple[Pass, ...] = (
    *_FOR_BOTH,
    raise_frozen_gemm,
    float_scalars,
    merge_shape_ops,
    share_shape_ops,
    view_frozen,
)
"""Rewrites for the ExecuTorch step. `raise_frozen_gemm` recognises frozen weights only once shape
operations are merged, and adds permutes that are then merged again."""


def apply(module: fx.GraphModule, passes: Sequence[Pass]) -> dict[str, int]:
    """Run ``passes`` over ``module``, in place; ``meta["val"]`` is set anew on every node.

    Returns:
        Number of rewrites by pass; the runs of a pass that runs twice are added up.

    Raises:
        RuntimeError, ValueError: a rewrite left a call that torch would refuse.
    """
    rehome(module)
    counts: dict[str, int] = {}
    for rewrite in passes:
        counts[rewrite.__name__] = counts.get(rewrite.__name__, 0) + rewrite(module)
    sweep(module)
    propagate(module)
    return counts


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that may be rewritten; weights are shared, not copied."""
    graph = fx.Graph()
    graph.set_codegen(fx.graph.CodeGen())
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)
