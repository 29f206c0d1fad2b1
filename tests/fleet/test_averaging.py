"""What a fleet averages, and that the mean of factors is not the mean of what was learned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.errors import BadInput
from edge_dit_runtime.fleet.averaging import FIXED, PRODUCT, check_how, factors, received, sent

RANK, INNER, OUTER = 3, 7, 5
A, B = "transformer.to_q.lora_A.weight", "transformer.to_q.lora_B.weight"


def adapter(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(RANK, INNER)), rng.normal(size=(OUTER, RANK))
    return {A: a.astype(np.float32), B: b.astype(np.float32)}


def mean(each: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What FedAvg makes of devices that count the same."""
    return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}


def learned(lora: dict[str, np.ndarray]) -> np.ndarray:
    return lora[B] @ lora[A]


def test_the_mean_of_factors_is_not_the_mean_of_products():
    """Two devices that learned opposite signs of both factors learned the same matrix; the mean of
    their factors is nothing.
    """
    one = adapter(0)
    other = {name: -value for name, value in one.items()}
    np.testing.assert_array_equal(learned(other), learned(one))
    assert not learned(mean([one, other])).any()
    back = received(mean([sent(lora, PRODUCT) for lora in (one, other)]), one, PRODUCT)
    np.testing.assert_allclose(learned(back), learned(one), atol=1e-5)


def test_devices_of_random_adapters_show_how_far_off_the_mean_of_factors_is():
    each = [adapter(seed) for seed in range(8)]
    wanted = np.mean([learned(lora) for lora in each], axis=0)
    of_factors = learned(mean(each))
    of_products = learned(received(mean([sent(e, PRODUCT) for e in each]), each[0], PRODUCT))
    size = np.linalg.norm(wanted)
    off = np.linalg.norm(of_factors - wanted) / size
    best = np.linalg.svd(wanted, compute_uv=False)
    assert np.linalg.norm(of_products - wanted) == pytest.approx(
        np.linalg.norm(best[RANK:]), rel=1e-4
    ), "no matrix of this rank is closer (Eckart and Young)"
    assert np.linalg.norm(of_products - wanted) / size < off


def test_with_a_fixed_the_mean_is_exact():
    base = adapter(0)
    each = [{**base, B: adapter(seed)[B]} for seed in range(8)]
    back = received(mean([sent(lora, FIXED) for lora in each]), base, FIXED)
    wanted = np.mean([learned(lora) for lora in each], axis=0)
    np.testing.assert_allclose(learned(back), wanted, atol=1e-5)
    assert sent(base, FIXED).keys() == {B}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 10))
def test_factors_of_a_product_of_their_rank_multiply_to_it(outer, inner, rank, norm):
    rng = np.random.default_rng(outer + 10 * inner + 100 * rank)
    wanted = rng.normal(size=(outer, rank)) @ rng.normal(size=(rank, inner))
    a, b = factors(wanted, rank, norm)
    assert a.shape == (rank, inner)
    assert b.shape == (outer, rank)
    np.testing.assert_allclose(b @ a, wanted, atol=1e-9)


def test_a_begins_as_long_as_that_of_a_new_adapter():
    one = adapter(0)
    back = received(sent(one, PRODUCT), one, PRODUCT)
    assert np.linalg.norm(back[A]) == pytest.approx(np.linalg.norm(one[A]), rel=1e-5)


def test_where_nothing_was_learned_training_begins_with_the_bundles_a():
    base = {**adapter(0), B: np.zeros((OUTER, RANK), np.float32)}
    back = received(sent(base, PRODUCT), base, PRODUCT)
    np.testing.assert_array_equal(back[A], base[A])
    assert not back[B].any()


def test_convolutions_keep_their_shapes():
    one = {A: adapter(0)[A][:, :, None, None], B: adapter(0)[B][:, :, None, None]}
    assert sent(one, PRODUCT)["transformer.to_q"].shape == (OUTER, INNER)
    back = received(sent(one, PRODUCT), one, PRODUCT)
    assert {name: value.shape for name, value in back.items()} == {
        name: value.shape for name, value in one.items()
    }


@pytest.mark.parametrize("how", [PRODUCT, FIXED])
def test_the_mean_of_another_bundle_is_refused(how):
    other = {name.replace("to_q", "to_k"): value for name, value in adapter(0).items()}
    with pytest.raises(BadInput, match="the same bundle"):
        received(sent(other, how), adapter(0), how)


def test_another_average_is_refused():
    with pytest.raises(BadInput, match="product or fixed-a"):
        check_how("factors")
