"""The cost of a plan from shapes alone, against real tensors and public figures."""

import json

import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import variants
from edge_dit.budget.cost import Shapes, cost_of_plan, parameters
from edge_dit.cli import main
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER
from edge_dit.contract.names import FRESH, STORED, TAILS, THROUGH
from edge_dit.models.checkpoint import meta_model
from edge_dit.models.families import family_of
from edge_dit.models.public_configs import CONFIGS
from edge_dit.planning.plan import read_plan
from variants import GRID, SPLITS, VARIANTS

PUBLIC = {
    "flux.1-dev": 11.90e9,
    "sana-0.6b": 0.592e9,
    "sana-1.6b": 1.604e9,
    "sd3-medium": 2.03e9,
    "sd3.5-medium": 2.24e9,
    "sd3.5-large": 8.06e9,
    "pixart-sigma-xl": 0.61e9,
    "lumina-image-2.0": 2.6e9,
    "chroma1-hd": 8.9e9,
    # a file of 7.22 GiB in bfloat16
    "flux.2-klein-4b": 3.876e9,
    "z-image": 6.15e9,
    # total_size of its index, in bfloat16
    "qwen-image-2.1": 14_230_249_472 / 2,
}
"""Parameters as published, rounded as published."""
PER_BLOCK = {
    ("flux.1-dev", "transformer_blocks.0"): 339.8e6,
    ("flux.1-dev", "single_transformer_blocks.0"): 141.6e6,
    ("sana-1.6b", "transformer_blocks.0"): 77.9e6,
    ("sana-0.6b", "transformer_blocks.0"): 20.65e6,
    ("sd3.5-large", "transformer_blocks.1"): 213e6,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_public_configurations_have_the_published_parameters(name):
    public = CONFIGS[name]
    found = parameters(meta_model(family_of(public.family), public.config))
    published = PUBLIC.get(name)
    if published is None:  # schnell is dev without the guidance embedding; Qwen-Image: "20B"
        # klein 9B by hand, D = 4096: 26 D^2 a double block, 13 D^2 a single one, 18 D^2 besides,
        # and the embeddings of 128, 12288, 256 and 128 channels
        klein = (8 * 26 + 24 * 13 + 18) * 4096**2 + 12800 * 4096
        published = {
            "flux.1-schnell": 11.891e9,
            "qwen-image": 20.43e9,
            "flux.2-klein-9b": float(klein),
            # "12B" to its authors, "12.9B" to others: diffusers' class by its defaults
            "krea-2": 12.82e9,
        }[name]
    digits = len(f"{published:.0f}".rstrip("0"))
    rounding = 0.5 / 10 ** (digits - 1)
    assert abs(found / published - 1) < max(0.001, rounding)


@pytest.mark.parametrize(("name", "block"), PER_BLOCK)
def test_blocks_have_the_published_parameters(name, block):
    from edge_dit.models.checkpoint import meta_model

    public = CONFIGS[name]
    family = family_of(public.family)
    found = family.blocks(meta_model(family, public.config))[block]
    assert sum(p.numel() for p in found.parameters()) == pytest.approx(
        PER_BLOCK[name, block], rel=2.5e-3
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_those_of_a_real_step(variant, tail):
    made = variants.case(variant)
    shapes = Shapes(
        made.family,
        meta_model(made.family, dict(made.model.config)),
        GRID,
        variants.text_of(variant),
    )
    for trained in SPLITS.values():
        if tail != STORED and trained[-1] == 3:
            continue  # no block is left that could run; a plan then says "stored"
        estimate = shapes.cost(trained, variants.RANK, tail)
        assert_bytes_are_right(variants.case(variant), trained, estimate, tail)


def assert_bytes_are_right(made, trained, estimate, tail):
    variants.with_lora(made, trained, tail=tail)
    sub, batch = variants.subgraph(made, trained, tail=tail)
    assert estimate.lora == sum(p.numel() for p in sub.lora_parameters().values())
    assert estimate.parameters == sum(p.numel() for p in sub.parameters() if not p.requires_grad)
    stored = sum(
        value.numel()
        for name, value in batch.items()
        if name.removeprefix("cond.") not in made.family.per_prompt
    )
    assert estimate.bank_bytes == 4 * stored

    own = {t.untyped_storage().data_ptr() for t in [*sub.parameters(), *batch.values()]}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so no address comes twice
        return tensor

    with (
        sdpa_kernel(SDPBackend.MATH),
        made.family.traceable(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        sub(batch)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert estimate.activation_bytes == pytest.approx(real, rel=0.02)


def test_a_tail_that_runs_costs_a_forward_pass_and_through_it_one_back():
    """A pass is two operations for each parameter and token, in SANA, and back as many."""
    public = CONFIGS["sana-0.6b"]
    family = family_of(public.family)
    shapes = Shapes(family, meta_model(family, public.config), (16, 16), 300)
    trained = range(5, 24)  # of 28 blocks
    flops = {tail: shapes.cost(trained, 1, tail).flops for tail in TAILS}
    once = 4 * 2 * 20.65e6 * 256
    assert flops[FRESH] - flops[STORED] == pytest.approx(once, rel=0.2)
    assert flops[THROUGH] - flops[STORED] == pytest.approx(2 * once, rel=0.2)


def test_operations_count_two_per_multiply_and_add():
    """A block of SANA is mostly dense layers: twice parameters times tokens, forward, and as much
    again for the gradient of the input.
    """
    public = CONFIGS["sana-0.6b"]
    family = family_of(public.family)
    shapes = Shapes(family, meta_model(family, public.config), (16, 16), 300)
    one, two = shapes.cost([13], 1), shapes.cost([13, 14], 1)
    per_block = two.flops - one.flops
    assert per_block == pytest.approx(2 * 2 * 20.65e6 * 256, rel=0.2)
    assert two.parameters - one.parameters == pytest.approx(20.65e6, rel=2.5e-3)


def test_a_plans_cost_is_that_of_its_bank_and_adapter(road):
    from edge_dit.contract.adapter import read_adapter

    columns = cost_of_plan(road.plan)
    estimate = columns["this plan"]
    lora, *_ = read_adapter(road.bundle / ADAPTER)
    assert estimate.lora == sum(value.size for value in lora.values())
    index = Bank(road.bank).index
    shard = load_file(road.bank / "shard-00000.safetensors")
    stored = sum(value.nbytes for value in shard.values())
    assert stored == pytest.approx(estimate.bank_bytes * len(index.members(0)), rel=0.1)
    assert columns["full LoRA"].total_bytes > estimate.total_bytes


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["edge-dit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_plan_of_a_public_configuration_prints_what_it_takes(monkeypatch, capsys):
    arguments = ("cost", "sana-0.6b", "--skip-ratio", "0.5")
    code, text, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    for role in ("frozen weights", "optimizer", "activations", "bank, per draw", "operations"):
        assert role in text
    code, text, _ = run(monkeypatch, capsys, *arguments, "--json")
    facts = json.loads(text)
    assert facts["layers"] == 28
    assert facts["cost"]["this plan"]["blocks"] == 14


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cost", "flux"], "flux.1-dev"),
        (["cost", "flux.1-dev", "--patch", "250"], "240 or 256"),
        (["cost", "flux.1-dev", "--head-skip", "57"], "no block to train"),
        (["cost"], "Missing argument 'config'"),
        (["plan"], "Missing argument 'job'"),
        (["plan", "job.toml", "--config", "flux.1-dev"], "edge-dit cost CONFIG"),
    ],
)
def test_bad_input_is_one_clear_error(monkeypatch, capsys, arguments, words):
    code, _, text = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in text


def test_a_plan_that_is_written_is_read_back(road, monkeypatch, capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, text, _ = run(monkeypatch, capsys, "plan", road.job, "-o", path)
    assert code == 0
    assert "activations" in text
    assert read_plan(path) == road.plan.model_copy(update={"model": None})
