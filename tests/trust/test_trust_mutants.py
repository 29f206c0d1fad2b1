"""What verify finds of mistakes that are planted by kind in bundles of all families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from mutants import FAMILIES, Judge, Verdict, judge_of, run, sample, summary
from planting import CLAIMS, Mutant, place_of

from edge_dit.app.verify import Reference, verify
from edge_dit.contract.certificate import Difference, Draws, TargetResult
from edge_dit.reference import locate
from edge_dit.reference.locate import Modules, Suspect
from pipelines import PIPELINES
from worlds import make_world

LEAST_PLANTED, LEAST_CAUGHT = 150, 0.98
LEAST_BLOCK, LEAST_MODULE = 0.9, 0.8
CLEAN = [(name, seed) for seed in range(5) for name in PIPELINES]
"""Clean bundles: every pipeline with five seeds."""
WIDE = {("sana-1.5", 0), ("flux-dev", 0), ("qwen-image", 0)}
"""Those of which every target is verified."""


def check(verdicts: Sequence[Verdict]) -> None:
    """That every quota is kept."""
    found = summary(verdicts)
    gaps = [miss for miss in found["misses"] if miss["reason"] == "gap"]
    assert found["caught_share"] >= LEAST_CAUGHT, gaps
    assert found["named_block"] >= LEAST_BLOCK * found["with_a_block"], found["not_named"]
    assert found["named_module"] >= LEAST_MODULE * found["with_a_module"], found["not_named"]


def few(judge: Judge, each: int, of_executorch: int) -> list[Verdict]:
    chosen: list[Mutant] = []
    for mutant in sample(judge.mutants(), each):
        if mutant.target == "executorch":
            of_executorch -= 1
            if of_executorch < 0:
                continue
        chosen.append(mutant)
    return [judge.verdict(mutant) for mutant in chosen]


@pytest.fixture(scope="module")
def judge(road) -> Judge:
    return Judge(road.plan, road.bank, road.bundle, "sana")


def test_a_sample_of_mutants_is_caught_and_named(judge, tmp_path):
    """30 of them; the matrix has more."""
    world = make_world(tmp_path, FAMILIES["flux"], ("onnx",))
    verdicts = few(judge, 4, 2)
    verdicts += few(judge_of(world, "flux"), 3, 0)
    assert len(verdicts) == 30
    check(verdicts)


def test_a_wrong_module_without_lora_is_named(judge):
    """Its own gradients do not exist: only errors of the others tell."""
    (mutant,) = [
        mutant
        for mutant in judge.mutants()
        if mutant.kind == "weight: noise of 1e-2"
        if (mutant.target, mutant.layout) == ("onnx", "fused")
        if (mutant.block, mutant.module) == ("transformer_blocks.1", "ff.conv_depth")
        if mutant.site.endswith("weight")
    ]
    line = judge.verdict(mutant).line
    assert line.endswith("most like a fault in transformer_blocks.1.ff.conv_depth")


@pytest.mark.slow
def test_fresh_points_tell_a_real_mutant(judge, tmp_path):
    """A miss is called equivalent where they do not: so they must be able to."""
    (mutant,) = [
        mutant
        for mutant in judge.mutants()
        if mutant.kind == "gradient 0.1 % too large" and mutant.layout == "fused"
        if mutant.target == "onnx" and mutant.site.endswith("1.attn2.to_v.lora_A.weight")
    ]
    shares = []
    for plant in (mutant.plant, lambda _: None):
        folder = judge.copy(tmp_path / str(len(shares)) / "bundle", "onnx")
        plant(folder)
        shares.append(judge.share_at_fresh_points(folder, mutant))
    assert shares[0] > 1
    assert shares[1] == 0


def test_gradients_beside_the_likely_module_come_first():
    rows = [
        Difference(f"gradients.{name}.lora_A.weight", "gradients", 1, 1, 0, error, 1e-4)
        for name, error in (("a.to_q", 0.9), ("a.to_k", 0.1), ("b.to_k", 0.5))
    ]
    result = TargetResult(Draws([0], [], [0]), rows, likely="a.norm", beside=["a.to_k"])
    assert [row.name.split(".lora")[0] for row in result.failed] == [
        "gradients.a.to_k",
        "gradients.a.to_q",
        "gradients.b.to_k",
    ]
    assert result.in_words().startswith("gradients.a.to_k")
    assert result.in_words().endswith("most like a fault in a.norm")


@pytest.mark.matrix
def test_mutants_of_every_family_target_and_layout(tmp_path):
    verdicts = run(tmp_path, list(FAMILIES), each=10)
    assert len(verdicts) >= LEAST_PLANTED
    assert {v.family for v in verdicts} == set(FAMILIES)
    cells = {("onnx", layout) for layout in ("fused", "recompute", "streamed")}
    cells |= {("ort-training", "fused"), ("executorch", "fused"), (CLAIMS, "fused")}
    assert {(v.target, v.layout) for v in verdicts} == cells
    check(verdicts)


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "seed"), CLEAN, ids=lambda value: str(value))
def test_clean_bundles_pass(tmp_path, name, seed):
    """Other weights, pictures, LoRA and ranks."""
    targets = ("onnx", "ort-training", "executorch") if (name, seed) in WIDE else ("onnx",)
    world = make_world(tmp_path, name, targets, seed=seed, rank=1 + seed, reweighed=True)
    certificate = verify(world.bundle, world.bank, model=world.plan.model)
    failed = [row.in_words() for result in certificate.targets.values() for row in result.failed]
    assert certificate.passed, (failed, certificate.false_claims, certificate.bank)


def test_verify_md_quotes_the_results():
    docs = Path(__file__).resolve().parent.parent.parent / "docs"
    found = json.loads((docs / "results" / "mutants.json").read_text())
    of, caught = found["planted"] - found["equivalent"], found["caught"]
    words = (
        f"Of {found['planted']} planted, {found['equivalent']} are equivalent and {caught} of the "
        f"other {of} were caught. Of {found['with_a_block']} in one block, the first line named "
        f"the block in {found['named_block']}; of {found['with_a_module']} in one module, the "
        f"module in {found['named_module']}."
    )
    assert words in " ".join((docs / "verify.md").read_text().split())


def test_places_are_read_from_names():
    to_q = ("transformer_blocks.1", "attn1.to_q")
    for name in (
        "transformer_blocks__1__attn1__to_q__base_layer__weight",
        "grad.transformer.transformer_blocks.1.attn1.to_q.lora_B.weight",
        "transformer_blocks.1.attn1.to_q.bias",
        "exp_avg.transformer.transformer_blocks.1.attn1.to_q.lora_A.weight",
    ):
        assert place_of(name) == to_q
    single = place_of("single_transformer_blocks.0.proj_mlp.weight")
    assert single == ("single_transformer_blocks.0", "proj_mlp")
    table = place_of("transformer_blocks__1__scale_shift_table__as_1x6x32")
    assert table == ("transformer_blocks.1", None)
    assert place_of("proj_out.weight") == (None, None)


def test_nearest_modules_are_the_stages_around():
    calls = [("norm", False), ("q", True), ("k", True), ("mid", False), ("out", True), ("ff", True)]
    modules = Modules({"block": calls})
    assert modules.beside("k") == ["k"]
    assert set(modules.beside("mid")) == {"q", "k", "out", "ff"}
    assert set(modules.beside("norm")) == {"q", "k"}
    assert modules.beside("head") == []


def test_a_fault_of_the_backward_pass_lies_behind_the_last_wrong_module():
    modules = Modules({"a": [("a.q", True), ("a.norm", False)], "b": [("b.q", True)]})
    assert modules.behind({"a.q"}) == Suspect("a.norm", ["a.q"])
    assert modules.behind(set()) == Suspect()
    assert modules.behind({"a.q", "b.q"}) == Suspect()  # nothing is called after it


@pytest.fixture(scope="module")
def wrong(judge) -> tuple[Reference, dict[str, np.ndarray]]:
    """PyTorch's results, and loss and gradients with other weights of one module."""
    reference = judge.reference
    weight = reference.session.subgraph.get_parameter("transformer_blocks.1.ff.conv_depth.weight")
    kept = weight.detach().clone()
    noise = np.random.default_rng(0).normal(0, 1e-2, kept.shape)
    weight.data.add_(weight.new_tensor(noise))
    measured = dict(reference.gradients())
    weight.data.copy_(kept)
    return reference, measured


def test_a_search_names_the_module_and_leaves_the_weights(wrong):
    reference, measured = wrong
    weights = reference.session.subgraph.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    found = reference.suspect(measured, 1e-4)
    assert found.likely == "transformer_blocks.1.ff.conv_depth"
    assert all((weights[name] == value).all() for name, value in before.items())
    trained = set(reference.session.subgraph.lora_parameters())
    assert trained == {n.removeprefix("gradients.") for n in measured if n != "loss"}


def test_what_cannot_be_searched_is_not_located(wrong, monkeypatch):
    """A model for which it would take too long, and results that are no numbers."""
    reference, measured = wrong
    name = max(measured)
    nothing = {**measured, name: np.full_like(measured[name], np.nan)}
    assert reference.suspect(nothing, 1e-4) == Suspect()
    del nothing[name]
    assert reference.suspect(nothing, 1e-4) == Suspect()
    monkeypatch.setattr(locate, "MOST_SECONDS", 0.0)
    assert not reference.suspect(measured, 1e-4).likely
