"""Text is hidden from the image in the masked blocks, and nowhere else."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import variants
from edge_dit.errors import BadInput
from edge_dit.models.families.family import State
from edge_dit.select.masking import text_masked
from variants import GRID, VARIANTS

ALL = pytest.mark.parametrize("variant", VARIANTS)
JOINT = pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in (
    "sana", "sana-1.5", "sana-sprint", "pixart-sigma"
)])  # fmt: skip
CROSS = pytest.mark.parametrize("variant", ["sana", "sana-1.5", "sana-sprint", "pixart-sigma"])


def begun(variant):
    made = variants.case(variant)
    state, cond = made.family.begin(made.model, made.inputs)
    return made, state, cond


def other_text(made, state, cond):
    """The same call with other text tokens."""
    generator = torch.Generator().manual_seed(9)
    if made.family.joint:
        return State(state.image, torch.randn(state.text.shape, generator=generator)), cond
    changed = torch.randn(cond["encoder_hidden_states"].shape, generator=generator)
    return state, {**cond, "encoder_hidden_states": changed}


@torch.no_grad()
def text_matters(made, number, state, cond):
    """How much block ``number``'s image output changes with the text."""
    block = list(made.family.blocks(made.model).items())[number]
    one = made.family.run_block(*block, state, cond, GRID).image
    other = made.family.run_block(*block, *other_text(made, state, cond), GRID).image
    return float((one - other).abs().max())


@ALL
@pytest.mark.parametrize("number", range(4))
def test_a_masked_block_sees_no_text_and_the_others_do(variant, number):
    made, state, cond = begun(variant)
    assert text_matters(made, number, state, cond) > 1e-4
    with text_masked(made.family, made.model, [number]):
        assert text_matters(made, number, state, cond) == 0
        assert all(text_matters(made, n, state, cond) > 1e-4 for n in range(4) if n != number)


@ALL
def test_all_blocks_masked_hide_the_text_from_the_stock_forward(variant):
    made = variants.case(variant)
    changed = dict(made.inputs)
    changed["encoder_hidden_states"] = torch.randn(
        changed["encoder_hidden_states"].shape, generator=torch.Generator().manual_seed(9)
    )

    def difference():
        with torch.no_grad():
            found = [made.family.forward(made.model, i) for i in (made.inputs, changed)]
        return float((found[0] - found[1]).abs().max())

    assert difference() > 1e-4
    with text_masked(made.family, made.model, range(4)):
        assert difference() == 0
    with text_masked(made.family, made.model, range(3)):  # one block forgotten is noticed
        assert difference() > 1e-5


@ALL
def test_outside_the_context_the_model_is_as_before(variant):
    made = variants.case(variant)
    with torch.no_grad():
        before = made.family.forward(made.model, made.inputs)
        with text_masked(made.family, made.model, range(4)):
            assert not torch.equal(made.family.forward(made.model, made.inputs), before)
        with text_masked(made.family, made.model, []):
            assert torch.equal(made.family.forward(made.model, made.inputs), before)
        assert torch.equal(made.family.forward(made.model, made.inputs), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())


@JOINT
@pytest.mark.parametrize("number", range(3))  # SD3's last block returns no text
def test_text_queries_see_what_they_saw(variant, number):
    made, state, cond = begun(variant)
    block = list(made.family.blocks(made.model).items())[number]
    with torch.no_grad():
        stock = made.family.run_block(*block, state, cond, GRID)
        with text_masked(made.family, made.model, [number]):
            masked = made.family.run_block(*block, state, cond, GRID)
    assert (masked.text - stock.text).abs().max() < 1e-5
    assert (masked.image - stock.image).abs().max() > 1e-4


@JOINT
def test_image_tokens_still_see_each_other(variant):
    made, state, cond = begun(variant)
    moved = state.image.clone()
    moved[:, -1].normal_(generator=torch.Generator().manual_seed(3))
    block = next(iter(made.family.blocks(made.model).items()))
    with torch.no_grad(), text_masked(made.family, made.model, [0]):
        one = made.family.run_block(*block, state, cond, GRID).image
        other = made.family.run_block(*block, State(moved, state.text), cond, GRID).image
    assert (one[:, 0] - other[:, 0]).abs().max() > 1e-5


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "z-image"])
def test_a_batch_is_masked_row_by_row(variant):
    """As under classifier-free guidance: two prompts at once, one of them shorter."""
    made = variants.case(variant)
    both, alone = batch_of_two(made)
    with torch.no_grad(), text_masked(made.family, made.model, range(4)):
        if variant == "lumina2":  # its batches have no padding before the picture
            with pytest.raises(BadInput, match="texts of 5 and 2 tokens"):
                made.family.forward(made.model, both)
            return
        found = made.family.forward(made.model, both)
        expected = made.family.forward(made.model, alone)
    assert (found[:1] - expected).abs().max() < 1e-5
    assert torch.isfinite(found).all()


def test_a_batch_of_lists_is_masked_row_by_row():
    """Z-Image's, whose texts come last: they may be of several lengths."""
    made = variants.case("z-image")
    generator = torch.Generator().manual_seed(9)
    films = [torch.randn(4, 1, 4, 6, generator=generator) for _ in range(2)]
    texts = [torch.randn(length, 24, generator=generator) for length in (34, 5)]
    time = torch.tensor([0.3, 0.3])
    with torch.no_grad(), text_masked(made.family, made.model, range(4)):
        found = made.model(films, time, texts, return_dict=False)[0]
        expected = made.model(films[:1], time[:1], texts[:1], return_dict=False)[0]
        other = made.model(films[:1], time[:1], texts[1:], return_dict=False)[0]
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert torch.isfinite(found[1]).all()
    assert (expected[0] - other[0]).abs().max() < 1e-5  # turned alike, image tokens see no text


def batch_of_two(made):
    """Inputs of a batch whose second text is shorter, and those of its first row."""
    names = [n for n, v in made.inputs.items() if torch.is_tensor(v) and not n.endswith("_ids")]
    both = dict(made.inputs)
    generator = torch.Generator().manual_seed(9)
    for name in names:
        value = made.inputs[name]
        second = value if name in ("timestep", "guidance") else torch.randn(
            value.shape, generator=generator
        )  # fmt: skip
        if name.endswith("mask"):
            second = torch.ones_like(value)
            second[:, 2:] = 0
        both[name] = torch.cat([value, second])
    if "img_shapes" in both:
        both["img_shapes"] = made.inputs["img_shapes"] * 2
    alone = {n: (v[:1] if n in names else v) for n, v in both.items()} | {
        n: v for n, v in made.inputs.items() if n not in names
    }
    return both, alone


def test_masks_that_are_passed_already_still_hold():
    """Qwen's padding: text queries see none of it, masked block or not."""
    made, state, cond = begun("qwen-image")
    padded = state.text.clone()
    padded[:, -2:].normal_(generator=torch.Generator().manual_seed(3))
    block = next(iter(made.family.blocks(made.model).items()))
    with torch.no_grad(), text_masked(made.family, made.model, [0]):
        one = made.family.run_block(*block, state, cond, GRID)
        other = made.family.run_block(*block, State(state.image, padded), cond, GRID)
    assert torch.equal(one.text[:, :-2], other.text[:, :-2])


def test_an_additive_mask_is_merged():
    """-inf where a key is hidden, elsewhere what was passed."""
    made, state, cond = begun("flux-dev")
    block = next(iter(made.family.blocks(made.model).values()))
    size = state.text.shape[1] + state.image.shape[1]
    bias = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
    arguments = made.family.arguments(cond, GRID)

    def run(mask):
        return block(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            joint_attention_kwargs={"attention_mask": mask},
            **arguments,
        )[1]

    hidden = bias.clone()
    hidden[state.text.shape[1] :, : state.text.shape[1]] = float("-inf")
    with torch.no_grad():
        expected = run(hidden)
        with text_masked(made.family, made.model, [0]):
            found = run(bias)
    assert (found - expected).abs().max() < 1e-6


@CROSS
def test_a_mask_of_zeros_would_hide_nothing(variant):
    """The trap that FAMILIES.md warns of: an all-zero text mask is one bias for every key."""
    made, state, cond = begun(variant)
    blind = {
        **cond,
        "encoder_attention_mask": torch.full_like(cond["encoder_attention_mask"], -1e4),
    }
    assert text_matters(made, 0, state, blind) > 1e-4


@JOINT
def test_the_mask_is_left_when_a_block_raises(variant):
    made, state, cond = begun(variant)
    block = next(iter(made.family.blocks(made.model).items()))
    norm = next(
        m for n, m in block[1].named_modules() if n.endswith(("norm", "norm1", "img_norm1"))
    )
    for kind in (RuntimeError, KeyboardInterrupt):

        def fail(*_, kind=kind):
            raise kind

        handle = norm.register_forward_hook(fail)
        with pytest.raises(kind), text_masked(made.family, made.model, [0]):
            made.family.run_block(*block, state, cond, GRID)
        handle.remove()
        assert torch.overrides._len_torch_function_stack() == 0
        assert text_matters(made, 0, state, cond) > 1e-4


def test_attention_that_torch_does_not_compute_is_refused(monkeypatch):
    made, state, cond = begun("flux-dev")
    from diffusers.models.transformers import transformer_flux

    def elsewhere(query, key, value, **_):
        weights = torch.einsum("bshd,bthd->bhst", query, key).softmax(-1)
        return torch.einsum("bhst,bthd->bshd", weights, value)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", elsewhere)
    with text_masked(made.family, made.model, [1]):
        text_matters(made, 0, state, cond)
        with pytest.raises(BadInput, match="native"):
            text_matters(made, 1, state, cond)


@ALL
def test_lora_is_masked_with_its_block(variant):
    made, state, cond = begun(variant)
    variants.with_lora(made, range(4))
    assert any(isinstance(m, BaseTunerLayer) for m in made.model.modules())
    with text_masked(made.family, made.model, [1]):
        assert text_matters(made, 1, state, cond) == 0
