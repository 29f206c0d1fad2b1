"""Tail blocks that run on the device: every layout trains like torch."""

import pytest

import bundles
from edge_dit.contract.names import FRESH, THROUGH
from edge_dit.contract.targets import FROZEN, OnnxFacts, block_file
from edge_dit_runtime.session import open_session
from variants import VARIANTS

QUICK = ("sana-1.5", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image")
"""One variant of each family."""
TAILS = pytest.mark.parametrize("tail", [FRESH, THROUGH])


CASES = [
    # FLUX's tail then has blocks of both kinds.
    pytest.param("flux-dev start", id="flux-dev-start"),
    *(pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in VARIANTS),
]
"""Variant, and where its trained blocks lie if not across the middle; most run before a release."""


def made(case, tail):
    variant, _, split = case.partition(" ")
    return bundles.made_variant(variant, split or "across", tail=tail)


@TAILS
@pytest.mark.parametrize("case", CASES)
def test_streamed_trains_like_torch(case, tail, tmp_path):
    *_, batch, bundle = bundles.write(tmp_path, "onnx", made=made(case, tail))
    assert "tail_residual" not in batch
    sub, _ = made(case, tail)
    bundles.assert_trains_like_torch(open_session(bundle, "onnx", "streamed"), sub, batch)


@TAILS
@pytest.mark.parametrize("variant", ["sana-1.5", "flux-dev"])
def test_whole_graphs_train_like_torch(variant, tail, tmp_path):
    *_, batch, bundle = bundles.write(tmp_path, "onnx", made=made(variant, tail))
    for layout in ("fused", "recompute"):
        sub, _ = made(variant, tail)
        bundles.assert_trains_like_torch(open_session(bundle, "onnx", layout), sub, batch)


def test_a_fresh_tail_has_no_backward_graph_and_a_tail_no_lora(tmp_path):
    for tail in (FRESH, THROUGH):
        folder = tmp_path / tail
        sub, _, bundle = bundles.write(folder, "onnx", made=made("sana-1.5", tail))
        facts = bundle.facts("onnx")
        assert isinstance(facts, OnnxFacts)
        streamed = facts.streamed
        blocks = streamed.forward_only if tail == FRESH else streamed.blocks[2:]
        assert [block.name for block in blocks] == sub.after
        assert len(streamed.blocks) == (2 if tail == FRESH else 3)
        (last,) = blocks
        assert last.lora == {}
        assert last.kind != streamed.blocks[0].kind
        backward = block_file(last.kind, "backward")
        assert (backward in streamed.graphs) == (folder / "onnx" / backward).exists()
        assert (backward in streamed.graphs) == (tail == THROUGH)
        assert f'"{last.name}.'.encode() in (folder / "onnx" / FROZEN).read_bytes()
        assert "tail_residual" not in streamed.graphs["head.onnx"].inputs
