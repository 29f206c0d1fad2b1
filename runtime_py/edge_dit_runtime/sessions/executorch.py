"""Trains a bundle's ExecuTorch programs.

This is the one session that needs torch, because ExecuTorch's Python runtime takes torch tensors.
The programs themselves need none on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.targets import OPTIMIZER_PROGRAM, SAMPLER_PROGRAM, TRAIN_PROGRAM
from edge_dit.errors import BadInput, require
from edge_dit_runtime.sessions.graph import GraphSession

TARGET = "executorch"


def open_session(bundle: Bundle, layout: str) -> GraphSession:
    """A session over the train and optimizer programs; there is one layout.

    Raises:
        BadInput: executorch is not installed, or cannot load a program.
    """
    step = ExecuTorchProgram(bundle.file(TARGET, TRAIN_PROGRAM))
    return GraphSession(bundle, step, ExecuTorchProgram(bundle.file(TARGET, OPTIMIZER_PROGRAM)))


def open_sampler(bundle: Bundle) -> Callable[..., np.ndarray]:
    """The patch sampler, see `edge_dit_runtime.session.open_sampler`."""
    program = ExecuTorchProgram(bundle.file(TARGET, SAMPLER_PROGRAM))
    return lambda *arguments: program(*arguments)[0]


class ExecuTorchProgram:
    """The "forward" of a .pte file on numpy arrays.

    Args:
        path: the .pte file.

    Raises:
        BadInput: executorch is not installed, or cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        runtime = _runtime()
        try:
            # The runtime's Program owns what its methods read: it must outlive them.
            self._program = runtime._load_program(str(path))
            self._method: Any = self._program.load_method("forward")
        except (OSError, RuntimeError) as error:
            raise BadInput(
                path,
                found=f"ExecuTorch cannot load it: {error}",
                expected="a program of ExecuTorch 1.5",
                remedy="export the bundle again",
            ) from None

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run it. Inputs have the shapes and dtypes of the export; outputs are new arrays."""
        import torch

        inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        outputs = self._method(inputs, clone_outputs=False)
        return [output.numpy().copy() for output in outputs]


def _runtime() -> Any:
    """ExecuTorch's bindings.

    `executorch.runtime`, which wraps them, imports all of the exporter: 4 s and 130 MB more
    (executorch 1.5.1).
    """
    require("executorch", "the executorch target")
    import torch  # noqa: F401  # loads the libraries that the bindings need
    from executorch.extension.pybindings import _C

    return _C
