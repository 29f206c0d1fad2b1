"""Adapter, moments and step count inside an onnxruntime-training checkpoint file.

The file is a flatbuffer (microsoft/onnxruntime, onnxruntime/core/flatbuffers/schema/
ort_training_checkpoint.fbs). Every value has a fixed place and size, so views of the file's bytes
are enough to read a checkpoint and to write other values into it.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from edge_dit.contract.names import ADAPTED, MOMENTS

STEP_FIELD = 6
"""Number of OptimizerGroup.step in the table, as in the generated OptimizerGroup.Step()."""


def views(checkpoint: bytearray) -> dict[str, np.ndarray]:
    """Writable views into a checkpoint that was saved with its optimiser state.

    Returns:
        "adapter.<name>", "exp_avg.<name>", "exp_avg_sq.<name>", flat float32; and "step", int64
        [1], which is absent before the first update because flatbuffers leave zeros out.
    """
    root = _schema().GetRootAs(checkpoint, 0)
    module, group = root.ModuleState(), root.OptimizerGroups(0)
    tensors: dict[str, np.ndarray] = {}
    for i in range(module.RequiresGradParamsLength()):
        tensor = module.RequiresGradParams(i)
        tensors[ADAPTED + tensor.Name().decode()] = _floats(tensor)
    for i in range(group.OptimizerStatesLength()):
        state = group.OptimizerStates(i)
        moments = {state.Momentums(j).Name(): state.Momentums(j) for j in range(2)}
        for prefix, moment in zip(MOMENTS, (b"momentum0", b"momentum1"), strict=True):
            tensors[prefix + state.ParamName().decode()] = _floats(moments[moment])
    offset = group._tab.Offset(STEP_FIELD)
    if offset:
        tensors["step"] = np.frombuffer(checkpoint, np.int64, 1, group._tab.Pos + offset)
    return tensors


def _floats(tensor: Any) -> np.ndarray:
    return tensor.RawDataAsNumpy().view(np.float32)


def _schema() -> Any:
    """The generated flatbuffer reader that the onnxruntime wheel ships."""
    importlib.import_module("onnxruntime.tools.ort_format_model")  # puts its folder on sys.path
    return importlib.import_module("ort_flatbuffers_py.fbs.Checkpoint").Checkpoint
