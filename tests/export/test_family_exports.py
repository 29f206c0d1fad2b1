"""Every target trains every variant like PyTorch, wherever the trained blocks lie."""

import pytest

import bundles
from edge_dit_runtime.session import open_session
from variants import SPLITS, VARIANTS

FULLEST = (
    "sana-1.5",
    "flux-dev",
    "sd3.5-medium",
    "pixart-sigma",
    "qwen-image",
    "qwen-image-zero-cond",
    "lumina2",
)
"""Of each family the variants that between them have every part of a block."""
QUICK = ("flux-dev", "pixart-sigma")
"""Those of which ExecuTorch is not slow to test."""
SLOW = [("flux-dev", "start"), ("flux-dev", "end"), ("sd3.5-medium", "across")]


def params(cases, quick):
    """Parameters of the cases. By default only the blocks across the middle of ``quick`` run; of
    the rest `SLOW` are slow, the others of the matrix that is run before a release.
    """

    def marks(case):
        yield pytest.mark.xdist_group("-".join(case))  # makes its bundle once
        if case[1] != "across" or case[0] not in quick:
            yield pytest.mark.slow if case in SLOW else pytest.mark.matrix

    return [pytest.param(case, id="-".join(case), marks=[*marks(case)]) for case in cases]


ONNX = [
    *((variant, split) for variant in FULLEST for split in SPLITS),
    *((variant, "across") for variant in VARIANTS if variant not in FULLEST),
    *((variant, "whole", "all") for variant in FULLEST),
]
"""Variant, split, and "all" where LoRA sits on every module that can carry it."""
EXECUTORCH = [
    *((variant, split) for variant in FULLEST for split in ("start", "across", "end")),
    ("flux-dev", "whole", "all"),
]


@pytest.fixture(scope="module")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    made = bundles.made_variant(*case)
    return folder, *bundles.write(folder, "onnx", "ort-training", made=made)


@pytest.mark.parametrize("case", params(ONNX, FULLEST), indirect=True, scope="module")
@pytest.mark.parametrize(
    ("target", "layout"),
    [("onnx", "fused"), ("onnx", "recompute"), ("onnx", "streamed"), ("ort-training", "fused")],
    ids=["onnx", "onnx-recompute", "onnx-streamed", "ort-training"],
)
def test_trains_like_torch(case, bundle, target, layout):
    _, _, batch, opened = bundle
    sub, _ = bundles.made_variant(*case)

    def session():
        return open_session(opened, target, layout)

    bundles.assert_trains_like_torch(session(), sub, batch)
    bundles.assert_resumes_bit_for_bit(session, batch)


@pytest.fixture(scope="module")
def executorch(case, tmp_path_factory):
    return bundles.run_executorch_child(tmp_path_factory.mktemp("executorch"), *case)


@pytest.mark.parametrize("case", params(EXECUTORCH, QUICK), indirect=True, scope="module")
@pytest.mark.parametrize("check", bundles.executorch_checks("FAMILY_CHECKS"))
def test_executorch_program(executorch, check):
    bundles.assert_passed(executorch, check)
