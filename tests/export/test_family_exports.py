"""Every target trains every variant like PyTorch, wherever the trained blocks lie."""

import onnx_ir as ir
import onnxruntime
import pytest
import torch

import bundles
import tiny
from edge_dit.contract.targets import WIDE
from edge_dit_export.graph.train_step import trace_train_step
from edge_dit_export.targets.onnx import frozen_store, train_step_model
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
    "chroma",
    "flux2-klein",
    "z-image",
    "krea-2",
    "qwen-image-2.1",
)
"""Of each family the variants that between them have every part of a block."""
QUICK = ("flux-dev", "pixart-sigma")
"""Those of which ExecuTorch is not slow to test."""
NEWER = ("lumina2", "chroma", "flux2-klein", "z-image", "krea-2", "qwen-image-2.1")
"""Those that by default one graph tests."""
IN_ONNX = [variant for variant in FULLEST if variant not in NEWER]
"""Those of which the ONNX targets are not slow to test."""
SLOW = [
    ("flux-dev", "start"),
    ("flux-dev", "end"),
    ("sd3.5-medium", "across"),
    *((variant, "across") for variant in NEWER),
]


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
    return bundles.write(folder, "onnx", made=bundles.made_variant(*case))


@pytest.fixture(scope="module")
def ort_bundle(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return bundles.write(folder, "ort-training", made=bundles.made_variant(*case))


@pytest.mark.parametrize("variant", NEWER)
def test_a_fused_step_has_the_loss_and_gradients_of_torch(variant, tmp_path):
    """Of one graph, without what is around it."""
    sub, batch = bundles.made_variant(variant, "across")
    store = frozen_store(sub, WIDE)
    store.write(tmp_path)
    step = trace_train_step(sub, batch)
    ir.save(train_step_model(step, store, tmp_path / "data"), tmp_path / "step.onnx")
    given = {**batch, **{name: p.detach() for name, p in sub.lora_parameters().items()}}
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    names = zip(session.get_inputs(), step.inputs, strict=True)
    found = session.run(None, {value.name: given[name].numpy() for value, name in names})
    named = dict(zip(step.outputs, map(torch.from_numpy, found), strict=True))
    tiny.assert_close(tiny.eager(sub, batch), named, 1e-5)


@pytest.mark.parametrize("case", params(ONNX, IN_ONNX), indirect=True, scope="module")
@pytest.mark.parametrize("layout", ["fused", "recompute", "streamed"])
def test_trains_like_torch(case, bundle, layout):
    trains_like_torch(case, bundle, "onnx", layout)


@pytest.mark.parametrize("case", params(ONNX, IN_ONNX), indirect=True, scope="module")
def test_onnxruntime_training_trains_like_torch(case, ort_bundle):
    trains_like_torch(case, ort_bundle, "ort-training", "fused")


def trains_like_torch(case, bundle, target, layout):
    _, batch, opened = bundle
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
