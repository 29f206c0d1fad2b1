"""Tail blocks that run on the device: every layout trains like torch."""

import pytest
import torch

import bundles
import tiny
from edge_dit.contract.names import FRESH, THROUGH
from edge_dit.contract.targets import FROZEN, StreamedFacts, block_file
from edge_dit.models.quantize import round_frozen
from edge_dit_export.graph.train_step import run, trace_train_step
from variants import VARIANTS

FAMILIES = ("sana-1.5", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image")
"""One variant of each family."""
MARKS = dict.fromkeys(FAMILIES, ())
CASES = [
    # FLUX's tail then has blocks of both kinds.
    pytest.param(("flux-dev", "start"), id="flux-dev-start"),
    *(
        pytest.param(
            (name, "across"), id=name, marks=() if name in FAMILIES else pytest.mark.matrix
        )
        for name in VARIANTS
    ),
]
"""Variants, and where their trained blocks lie."""
TAILS = pytest.mark.parametrize("tail", [FRESH, THROUGH])


@TAILS
@pytest.mark.parametrize("case", CASES)
def test_streamed_gradients_are_eagers(case, tail, tmp_path):
    sub, batch = bundles.made_variant(*case, tail=tail)
    assert "tail_residual" not in batch
    facts = bundles.streamed(tmp_path, (sub, batch), "float32")
    found = bundles.streamed_gradients(tmp_path, (sub, batch), facts)
    tiny.assert_close(tiny.eager(sub, batch), found, 1e-5)


@TAILS
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_tails_weights_are_rounded_like_the_others(dtype, tail, tmp_path):
    sub, batch = bundles.made_variant("sana-1.5", "start", tail=tail)
    facts = bundles.streamed(tmp_path, (sub, batch), dtype)
    exact = tiny.eager(sub, batch)
    for name in sub.after:
        round_frozen(sub.get_submodule(name), dtype)
    assert not torch.equal(tiny.eager(sub, batch)["loss"], exact["loss"])
    round_frozen(sub, dtype)
    found = bundles.streamed_gradients(tmp_path, (sub, batch), facts)
    tiny.assert_close(tiny.eager(sub, batch), found, 1e-5)


@TAILS
@pytest.mark.parametrize("recompute", [False, True], ids=["fused", "recompute"])
@pytest.mark.parametrize("variant", ["sana-1.5", "flux-dev"])
def test_traced_steps_equal_autograd(variant, recompute, tail):
    sub, batch = bundles.made_variant(variant, "across", tail=tail)
    step = trace_train_step(sub, batch, recompute)
    tiny.assert_close(tiny.eager(sub, batch), run(step, step.inputs), 1e-5)


@TAILS
def test_a_tails_blocks_have_no_lora_and_a_fresh_one_no_backward_graph(tail, tmp_path):
    sub, batch = bundles.made_variant("sana-1.5", "across", tail=tail)
    facts = StreamedFacts(**bundles.streamed(tmp_path, (sub, batch), "float32"))
    blocks = facts.forward_only if tail == FRESH else facts.blocks[2:]
    assert [block.name for block in blocks] == sub.after == ["transformer_blocks.3"]
    (last,) = blocks
    assert last.lora == {}
    assert last.kind != facts.blocks[0].kind
    backward = block_file(last.kind, "backward")
    assert (backward in facts.graphs) == (tmp_path / "onnx" / backward).exists()
    assert (backward in facts.graphs) == (tail == THROUGH)
    assert f'"{last.name}.'.encode() in (tmp_path / "onnx" / FROZEN).read_bytes()
    assert "tail_residual" not in facts.graphs["head.onnx"].inputs
