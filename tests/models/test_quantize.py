"""Frozen weights in fewer bytes: rounding, and the file they are stored in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from edge_dit.errors import BadInput
from edge_dit.models.quantize import (
    from_int4,
    group_of,
    matrices,
    round_frozen,
    rounded,
    to_int4,
    to_int8,
)
from edge_dit_export.targets.frozen import FrozenStore
from edge_dit_runtime.sessions.mapped import MappedTensors

WEIGHTS = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


@given(WEIGHTS)
def test_int8_is_within_half_a_step_and_rounding_twice_changes_nothing(array):
    weight = torch.from_numpy(array)
    values, scale = to_int8(weight)
    once = rounded(weight, "int8")
    assert values.abs().max() <= 127
    assert ((once - weight).abs() <= 0.501 * scale[:, None] + 1e-12).all()
    assert torch.equal(values.float() * scale[:, None], once)
    again, _ = to_int8(once)
    assert torch.equal(again, values)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([2, 6, 20, 40, 64, 112])),
        elements=st.floats(-8, 8, width=32, allow_subnormal=False),
    )
)
def test_int4_is_within_half_a_step_of_a_groups_scale(array):
    weight = torch.from_numpy(array)
    packed, scale = to_int4(weight)
    inputs = weight.shape[1]
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(weight), inputs // 2)
    assert scale.shape == (len(weight), inputs // group_of(inputs))
    once = rounded(weight, "int4")
    steps = scale.repeat_interleave(group_of(inputs), dim=1)
    assert ((once - weight).abs() <= 0.501 * steps + 1e-12).all()
    assert torch.equal(from_int4(packed, scale), once)
    assert torch.equal(to_int4(once)[0], packed)


def test_int4_bytes_have_the_halves_of_a_row():
    weight = torch.tensor([[1.0, -7.0, 3.0, 0.0]])
    packed, scale = to_int4(weight)
    assert scale.tolist() == [[1.0]]
    assert packed.tolist() == [[(1 + 8) | (3 + 8) << 4, (-7 + 8) | (0 + 8) << 4]]
    assert [group_of(n) for n in (2240, 112, 40, 36, 20)] == [32, 16, 8, 36, 20]


def test_an_odd_row_is_in_int8_where_others_are_in_four_bits():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    odd, even = (model[n].weight.clone() for n in (0, 1))
    round_frozen(model, "int4")
    assert torch.equal(model[0].weight, rounded(odd, "int8"))
    assert torch.equal(model[1].weight, rounded(even, "int4"))
    assert not torch.equal(model[1].weight, rounded(even, "int8"))


@given(WEIGHTS)
def test_float16_rounds_once(array):
    once = rounded(torch.from_numpy(array), "float16")
    assert torch.equal(rounded(once, "float16"), once)


def test_only_matrices_are_rounded_and_lora_is_not():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4),
        torch.nn.LayerNorm(4),
        torch.nn.Conv2d(2, 3, 1),
        torch.nn.Linear(4, 4),
    ).requires_grad_(False)
    model[3].requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(matrices(model)) == {"0.weight", "2.weight"}
    round_frozen(model, "int8")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.weight", "2.weight"}


@given(WEIGHTS, st.sampled_from(["float32", "float16", "int8", "int4"]))
def test_the_file_holds_the_rounded_weights_where_it_says(tmp_path_factory, array, dtype):
    path = tmp_path_factory.mktemp("frozen") / "frozen.safetensors"
    weight, bias = torch.from_numpy(array), torch.arange(3.0)
    if dtype == "int4":
        weight = torch.cat([weight, weight], dim=1)
    store = FrozenStore({"weight": weight, "bias": bias}, {"weight": dtype})
    assert store.write(path.parent) == [path.name]
    found, mapped = load_file(path), MappedTensors(path)
    assert set(found) == {"bias", *store.keys("weight")}
    back = found["weight"].float()
    if dtype == "int8":
        back = back * found["weight.scale"][:, None]
    if dtype == "int4":
        back = from_int4(found["weight"], found["weight.scale"])
    assert torch.equal(back, rounded(weight, dtype))
    raw = path.read_bytes()
    for name, tensor in found.items():
        place = store.place(name)
        assert place.file == path.name
        assert raw[place.offset : place.offset + place.length] == tensor.numpy().tobytes()
        assert place.offset % tensor.element_size() == 0
        np.testing.assert_array_equal(mapped[name], tensor.numpy())
    mapped.release()
    np.testing.assert_array_equal(mapped["bias"], bias.numpy())


@given(st.data())
def test_a_damaged_file_of_weights_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("frozen") / "frozen.safetensors"
    FrozenStore({"weight": torch.ones(4, 4)}, {}).write(path.parent)
    whole = path.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    longer = whole + data.draw(st.binary(min_size=1, max_size=9))
    header = data.draw(st.binary(max_size=90)) + whole[90:]
    path.write_bytes(data.draw(st.sampled_from([cut, longer, header])))
    if path.read_bytes()[:100] != whole[:100] or path.stat().st_size != len(whole):
        with pytest.raises(BadInput, match="frozen"):
            MappedTensors(path)
