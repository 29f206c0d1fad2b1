"""Loads equal delegates of an ExecuTorch program once.

ExecuTorch 1.5.1 writes a delegate for every call. XNNPACK packs the weights of each when the
program is loaded, so a layer that runs twice (where the backward pass computes its block again)
would lie in memory twice. A delegate has no state between calls: calls may share it.
"""

from __future__ import annotations

from typing import Any

from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.capture._config import ExecutorchBackendConfig
from executorch.exir.schema import DelegateCall


def delegates_once(program: Any, config: ExecutorchBackendConfig) -> None:
    """Let the calls of equal delegates run one of them, in place.

    Args:
        program: an ExecutorchProgramManager.
        config: what it was made with.
    """
    for plan in program.executorch_program.execution_plan:
        first: dict[object, int] = {}
        places, kept = [], []
        for delegate in plan.delegates:
            # Equal bytes are stored once: their place identifies them.
            key = (delegate.id, str(delegate.processed), str(delegate.compile_specs))
            if key not in first:
                first[key] = len(kept)
                kept.append(delegate)
            places.append(first[key])
        plan.delegates = kept
        for chain in plan.chains:
            for instruction in chain.instructions:
                if isinstance(instruction.instr_args, DelegateCall):
                    call = instruction.instr_args
                    call.delegate_index = places[call.delegate_index]
    program._pte_data, program._tensor_data = serialize_for_executorch(
        program._emitter_output, config, program._data_serializer, program._named_data
    )
