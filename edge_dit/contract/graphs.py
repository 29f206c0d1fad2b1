"""Graphs of a manifest by their names of arguments and results; blocks that they compute."""

from __future__ import annotations

from pydantic import BaseModel

from edge_dit.contract.names import PlainName


class GraphNames(BaseModel):
    """Names of a graph's arguments and results, in order."""

    inputs: list[str]
    outputs: list[str]


class StreamedBlock(BaseModel):
    """A block of the streamed layout.

    Attributes:
        name: of the block in the model.
        kind: names its graphs; blocks of one kind share them.
        weights: input of the graphs -> key in the files of frozen weights.
        lora: input of the graphs -> LoRA name.
        cond: input of the graphs -> batch tensor, where their names differ, because blocks have
            conditioning of their own.
        residual: if blocks before it are skipped, tensor of the state -> batch tensor that is added
            to it.
    """

    name: str = ""
    kind: PlainName
    weights: dict[str, str]
    lora: dict[str, str]
    cond: dict[str, str] = {}
    residual: dict[str, str] = {}
