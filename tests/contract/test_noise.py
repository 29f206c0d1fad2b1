"""Random numbers by contract (docs/noise.md)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edge_dit.contract import noise

DOCUMENT = Path(__file__).parents[2] / "docs" / "noise.md"
STREAMS = (noise.CROP, noise.POSTERIOR, noise.NOISE, noise.ORDER)


# Random123's kat_vectors, "philox4x32 10"
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_words(counter, key, words):
    parse = [[int(word, 16) for word in text.split()] for text in (counter, key, words)]
    found = noise.philox(np.array([parse[0]], np.uint64), tuple(parse[1]))
    assert found.tolist() == [parse[2]]


def vectors() -> dict:
    return json.loads(re.search(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1])


def test_the_document_has_the_numbers_that_we_draw():
    for case in vectors()["words"]:
        found = noise.words(case["seed"], case["stream"], len(case["words"]))
        assert [f"{word:08x}" for word in found] == case["words"]
    for case in vectors()["uniform"]:
        found = noise.uniform(case["seed"], case["stream"], len(case["numbers"]))
        assert found.tolist() == case["numbers"]
    for case in vectors()["normal"]:
        found = noise.normal(case["seed"], case["stream"], (len(case["numbers"]),))
        assert [np.float32(number) for number in case["numbers"]] == found.tolist()
    for case in vectors()["seed_of"]:
        assert noise.seed_of(case["seed"], case["number"]) == case["result"]
    for case in vectors()["permutation"]:
        found = noise.permutation(len(case["result"]), case["seed"], case["epoch"])
        assert found.tolist() == case["result"]


@given(st.integers(0, 2**64 - 1), st.sampled_from(STREAMS), st.integers(0, 50), st.integers(0, 50))
def test_a_longer_stream_begins_with_the_shorter(seed, stream, count, more):
    longer = noise.words(seed, stream, count + more)
    assert longer[:count].tolist() == noise.words(seed, stream, count).tolist()
    numbers = noise.normal(seed, stream, (count + more,))
    assert numbers[:count].tolist() == noise.normal(seed, stream, (count,)).tolist()
    assert np.isfinite(numbers).all()


@given(st.integers(0, 2**53 - 1), st.integers(0, 40), st.integers(0, 9))
def test_an_epoch_has_every_draw_once(seed, count, epoch):
    assert sorted(noise.permutation(count, seed, epoch)) == list(range(count))


def test_streams_and_seeds_have_their_own_numbers():
    drawn = [noise.words(seed, stream, 8).tolist() for seed in range(20) for stream in STREAMS]
    assert len({tuple(row) for row in drawn}) == len(drawn)
    seeds = {noise.seed_of(seed, number) for seed in range(20) for number in range(200)}
    assert len(seeds) == 4000
    assert max(seeds) < 2**53


@pytest.mark.parametrize("stream", STREAMS)
def test_normal_numbers_are_normal(stream):
    """Seeds are fixed, so this either holds or not."""
    numbers = noise.normal(7, stream, (100, 1000))
    assert stats.kstest(numbers.reshape(-1), "norm").pvalue > 0.01
    assert stats.kstest(noise.uniform(7, stream, 10000), "uniform").pvalue > 0.01
    neighbours = np.corrcoef(numbers.reshape(-1)[::2], numbers.reshape(-1)[1::2])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(numbers.size / 2)
