"""Whether this processor's int8 products are exact.

x86 processors with AVX2 but without VNNI add pairs of products in 16 bits: 255 * 127 + 255 * 127
becomes 32767. A step would silently learn something else.
"""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.errors import BadInput
from edge_dit_runtime.sessions.ort import onnxruntime, session_options

PROBE = base64.b64decode(
    "CAoSADpcChgKAXgKAXcSAXkiDU1hdE11bEludGVnZXISAWdaEwoBeBIOCgwIAhIICgIIAQoCCARaEwoBdxIOCgwIAxII"
    "CgIIBAoCCAFiEwoBeRIOCgwIBhIICgIIAQoCCAFCBAoAEBI="
)
"""An ONNX model: y = MatMulInteger(x, w); x uint8 [1, 4], w int8 [4, 1], y int32 [1, 1]."""


def check_exact_products(bundle: Path) -> None:
    """Refuse a bundle that multiplies in int8 where that would be wrong.

    Raises:
        BadInput: onnxruntime's products saturate on this processor.
    """
    if not products_are_exact(onnxruntime("the onnx target")):
        raise BadInput(
            bundle,
            found="products in int8, which this processor adds up in 16 bits (AVX2 without VNNI)",
            expected="exact sums: a processor with VNNI or AMX, or a 64-bit Arm",
            remedy='export with [export] compute = "float32"',
        )


@cache
def products_are_exact(module: Any) -> bool:
    """Whether the largest sum of products is what it should be.

    Args:
        module: onnxruntime.
    """
    session = module.InferenceSession(PROBE, session_options(module), ["CPUExecutionProvider"])
    x, w = np.full((1, 4), 255, np.uint8), np.full((4, 1), 127, np.int8)
    return int(session.run(None, {"x": x, "w": w})[0][0, 0]) == 4 * 255 * 127
