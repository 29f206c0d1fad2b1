"""The contract of test_families.py notices when a family goes wrong: perturbed on purpose."""

import pytest
import test_families as contract
import torch

import variants
from edge_dit.models.families import family, family_of
from edge_dit.models.families.family import State
from edge_dit.models.families.parts.joined import Joined
from edge_dit.models.subgraph import TrainableSubgraph
from variants import VARIANTS

replay = contract.test_replay_with_nothing_skipped_is_the_stock_forward
tail = contract.test_entry_state_trained_blocks_and_tail_residual_give_the_stock_forward
gradients = contract.test_gradients_are_the_stock_models_when_no_tail_is_skipped
JOINT = [name for name, (kind, _) in VARIANTS.items() if family_of(kind).joint]
CROSS = [name for name in VARIANTS if name not in JOINT]
TWO_STREAMS = [name for name in JOINT if not isinstance(family_of(VARIANTS[name][0]), Joined)]
ONE_SEQUENCE = [name for name in JOINT if isinstance(family_of(VARIANTS[name][0]), Joined)]


def assert_noticed(check, *arguments) -> None:
    """A check of the contract fails in a comparison of its own: a crash notices nothing."""
    with pytest.raises(AssertionError) as failure:
        check(*arguments)
    # An assertion within diffusers or torch is a crash too.
    assert failure.traceback[-1].path.name in ("test_families.py", "tiny.py")


def perturbed_conditioning(monkeypatch, variant, change):
    """Every block gets conditioning that went through ``change`` (a dict to a dict)."""
    kind = type(family_of(VARIANTS[variant][0]))
    stock = kind.arguments
    monkeypatch.setattr(kind, "arguments", lambda self, cond, grid: stock(self, change(cond), grid))


MODULATIONS = (
    *("temb", "timestep", "modulation", "temb_mod", "temb_mod_img", "temb_mod_txt"),
    "adaln_input",
)
"""What blocks call the embedding of the timestep."""
OF_HEADS = ("temb", "embedded_timestep", "modulation.head", "temb.head", "adaln_input")
"""The same of heads."""


def dropped(cond, names):
    """``cond`` with zeros for some names, of which it has at least one."""
    assert cond.keys() & names
    return {k: torch.zeros_like(v) if k in names else v for k, v in cond.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropped_modulation_is_noticed(variant, monkeypatch):
    perturbed_conditioning(monkeypatch, variant, lambda cond: dropped(cond, MODULATIONS))
    assert_noticed(replay, variant)
    assert_noticed(gradients, variant, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropped_modulation_of_the_head_is_noticed(variant, monkeypatch):
    kind = type(family_of(VARIANTS[variant][0]))
    stock = kind.head

    def head(self, model, image, cond, grid):
        return stock(self, model, image, dropped(cond, OF_HEADS), grid)

    monkeypatch.setattr(kind, "head", head)
    assert_noticed(replay, variant)
    assert_noticed(tail, variant, (0, 2))


@pytest.mark.parametrize("variant", TWO_STREAMS)
def test_swapped_streams_are_noticed(variant, monkeypatch):
    monkeypatch.setattr(variants, "TEXT", 8)  # as many as image tokens: shapes give nothing away
    replay(variant)
    kind = type(family_of(VARIANTS[variant][0]))
    stock = kind.run_block

    def run_block(self, name, block, state, cond, grid):
        image, text = stock(self, name, block, State(state.text, state.image), cond, grid)
        # SD3's last block hands no text on.
        return State(image, None) if text is None else State(text, image)

    monkeypatch.setattr(kind, "run_block", run_block)
    assert_noticed(replay, variant)


@pytest.mark.parametrize("variant", JOINT)
def test_text_that_is_not_handed_on_is_noticed(variant, monkeypatch):
    kind = type(family_of(VARIANTS[variant][0]))
    stock = kind.run_block

    def run_block(self, name, block, state, cond, grid):
        return State(stock(self, name, block, state, cond, grid).image, state.text)

    monkeypatch.setattr(kind, "run_block", run_block)
    assert_noticed(replay, variant)


@pytest.mark.parametrize("variant", ONE_SEQUENCE)
def test_a_sequence_the_other_way_round_is_noticed(variant, monkeypatch):
    kind = type(family_of(VARIANTS[variant][0]))
    stock = kind.run_block

    def run_block(self, name, block, state, cond, grid):
        with monkeypatch.context() as turned:
            turned.setattr(kind, "text_first", not kind.text_first)
            return stock(self, name, block, state, cond, grid)

    monkeypatch.setattr(kind, "run_block", run_block)
    assert_noticed(replay, variant)


@pytest.mark.parametrize("number", [1, 3])
def test_another_blocks_modulation_is_noticed(number, monkeypatch):
    """Of the same list of blocks, so that shapes give nothing away."""
    replay("chroma")
    kind = type(family_of("chroma"))
    stock, names = kind.run_block, [*family_of("chroma").blocks(variants.transformer("chroma"))]

    def run_block(self, name, block, state, cond, grid):
        wrong = names[number - 1] if name == names[number] else name
        return stock(self, wrong, block, state, cond, grid)

    monkeypatch.setattr(kind, "run_block", run_block)
    assert_noticed(replay, "chroma")


def test_the_other_streams_modulation_is_noticed(monkeypatch):
    def swapped(cond):
        if "temb_mod" in cond:
            return cond
        text, image = cond["temb_mod_txt"], cond["temb_mod_img"]
        return {**cond, "temb_mod_img": text, "temb_mod_txt": image}

    perturbed_conditioning(monkeypatch, "flux2-klein", swapped)
    assert_noticed(replay, "flux2-klein")


@pytest.mark.parametrize(
    "variant", ["flux-dev", "qwen-image", "chroma", "flux2-klein", *ONE_SEQUENCE]
)
def test_positions_the_wrong_way_round_are_noticed(variant, monkeypatch):
    def turn(cond):
        if "rope_cos" in cond:
            return {**cond, "rope_sin": -cond["rope_sin"]}
        if "rope" in cond:
            back = torch.tensor([1.0, -1.0]).repeat(cond["rope"].shape[-1] // 2)
            return {**cond, "rope": cond["rope"] * back}
        return {**cond, "rope_image": cond["rope_image"] * torch.tensor([1.0, -1.0])}

    perturbed_conditioning(monkeypatch, variant, turn)
    assert_noticed(replay, variant)


@pytest.mark.parametrize("variant", [*CROSS, "qwen-image", "chroma", "krea-2"])
def test_an_ignored_text_mask_is_noticed(variant, monkeypatch):
    def ignore(cond):
        if "attention_mask" in cond:
            name, everything = "attention_mask", torch.ones_like
        elif "encoder_attention_mask" in cond:
            name = "encoder_attention_mask"
            everything = torch.zeros_like if variant in CROSS else torch.ones_like
        else:
            name, everything = "encoder_hidden_states_mask", torch.ones_like
        return {**cond, name: everything(cond[name])}

    perturbed_conditioning(monkeypatch, variant, ignore)
    assert_noticed(replay, variant)


def test_text_modulated_by_the_time_is_noticed(monkeypatch):
    def timed(cond):
        return {**cond, "modulation": cond["modulation"][:1].expand(2, -1)}

    perturbed_conditioning(monkeypatch, "qwen-image-2.1", timed)
    assert_noticed(replay, "qwen-image-2.1")


def test_text_that_sees_what_follows_is_noticed(monkeypatch):
    kind = type(family_of("qwen_image21"))
    stock = kind.arguments

    def arguments(self, cond, grid):
        found = stock(self, cond, grid)
        return {**found, "segments": [(*one[:2], False) for one in found["segments"]]}

    monkeypatch.setattr(kind, "arguments", arguments)
    assert_noticed(replay, "qwen-image-2.1")


@pytest.mark.parametrize("variant", ["lumina2", "z-image", "qwen-image-2.1"])
def test_padding_that_is_not_dropped_is_noticed(variant, monkeypatch):
    monkeypatch.setattr(Joined, "seen", lambda self, cond: None)
    assert_noticed(replay, variant)


@pytest.mark.parametrize("variant", ["sana", "sana-1.5", "sana-sprint"])
def test_height_and_width_exchanged_are_noticed(variant, monkeypatch):
    kind = type(family_of("sana"))
    stock = kind.arguments
    turned = lambda self, cond, grid: stock(self, cond, (grid[1], grid[0]))  # noqa: E731
    monkeypatch.setattr(kind, "arguments", turned)
    assert_noticed(replay, variant)


@pytest.mark.parametrize("variant", ["sd3-medium", "sd3.5-medium", "sd3.5-large", "pixart-sigma"])
def test_rows_and_columns_exchanged_are_noticed(variant, monkeypatch):
    kind = type(family_of(VARIANTS[variant][0]))
    stock = kind.head

    def head(self, model, image, cond, grid):
        turned = stock(self, model, image, cond, (grid[1], grid[0]))
        return turned.reshape(stock(self, model, image, cond, grid).shape)

    monkeypatch.setattr(kind, "head", head)
    assert_noticed(replay, variant)


def test_shift_and_scale_exchanged_are_noticed(monkeypatch):
    kind = type(family_of("pixart"))
    stock = kind.head

    def head(self, model, image, cond, grid):
        table = model.scale_shift_table
        model.scale_shift_table = torch.nn.Parameter(table.flip(0))
        try:
            return stock(self, model, image, cond, grid)
        finally:
            model.scale_shift_table = table

    monkeypatch.setattr(kind, "head", head)
    assert_noticed(replay, "pixart-sigma")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_tail_residual_is_noticed(variant, monkeypatch):
    stock = TrainableSubgraph.predict

    def predict(self, batch):
        return stock(self, {**batch, "tail_residual": torch.zeros_like(batch["tail_residual"])})

    monkeypatch.setattr(TrainableSubgraph, "predict", predict)
    assert_noticed(tail, variant, (0, 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_in_another_order_are_noticed(variant, monkeypatch):
    stock = TrainableSubgraph.__init__

    def built(self, *arguments):
        stock(self, *arguments)
        # The first two, which are of one kind in every model; SD3's last block hands no text on.
        self.order[:2] = self.order[1::-1]

    monkeypatch.setattr(TrainableSubgraph, "__init__", built)
    assert_noticed(replay, variant)


def test_tokens_unpacked_in_another_order_are_noticed(monkeypatch):
    def unpatchify(tokens, grid, patch):
        rows, columns = grid
        tokens = tokens.reshape(1, rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return tokens.reshape(1, -1, rows * patch, columns * patch)

    from edge_dit.models.families import pixart, sd3

    for module in (family, pixart, sd3):
        monkeypatch.setattr(module, "unpatchify", unpatchify)
    assert_noticed(replay, "sd3-medium")
    assert_noticed(replay, "pixart-sigma")
