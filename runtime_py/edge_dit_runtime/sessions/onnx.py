"""The plain ONNX target in any onnxruntime: numpy and onnxruntime only."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.names import PATCH, SAMPLER_INPUTS
from edge_dit.contract.targets import OPTIMIZER, SAMPLER, STEP_FILES, STREAMED, WIDE, OnnxFacts
from edge_dit_runtime.sessions.graph import GraphSession
from edge_dit_runtime.sessions.int8 import check_exact_products
from edge_dit_runtime.sessions.mapped import MappedTensors
from edge_dit_runtime.sessions.onnx_program import OnnxProgram, OnnxUpdate
from edge_dit_runtime.sessions.ort import onnxruntime, share_arena
from edge_dit_runtime.sessions.streamed import StreamedStep

TARGET = "onnx"


def open_session(bundle: Bundle, layout: str) -> GraphSession:
    """A session with the train step, whole or block by block, and optimizer.onnx.

    Raises:
        BadInput: onnxruntime is not installed, or cannot load a graph; or the bundle multiplies in
            int8 and this processor cannot do that exactly.
    """
    ort = onnxruntime("the onnx target")
    facts = cast(OnnxFacts, bundle.facts(TARGET))
    if facts.compute != WIDE:
        check_exact_products(bundle.folder)
    if layout == STREAMED:
        assert facts.streamed is not None
        share_arena(ort, doubling=True)
        frozen = MappedTensors(*(bundle.file(TARGET, name) for name in facts.frozen))
        step = StreamedStep(bundle.manifest, facts.streamed, bundle.folder / TARGET, frozen)
    else:
        step = _program(bundle, facts, STEP_FILES[layout])
    names = facts.graphs[OPTIMIZER]
    update = OnnxUpdate(bundle.file(TARGET, OPTIMIZER), names.inputs, names.outputs)
    return GraphSession(bundle, step, update)


def open_sampler(bundle: Bundle, target: str = TARGET) -> Callable[..., np.ndarray]:
    """The patch sampler of a target that has it as an ONNX graph."""
    program = OnnxProgram(bundle.file(target, SAMPLER), list(SAMPLER_INPUTS), [PATCH])
    return lambda *arguments: program(*arguments)[0]


def _program(bundle: Bundle, facts: OnnxFacts, file: str) -> OnnxProgram:
    names = facts.graphs[file]
    return OnnxProgram(bundle.file(TARGET, file), names.inputs, names.outputs)
