"""Random numbers by contract: host and device, in any language, draw the same ones.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) turns a counter
and a key into four 32-bit words. Nothing else is kept, so number 1,000,000 costs as much as number
0. docs/noise.md states the contract with test vectors, for other languages.

    key      (low, high) 32 bits of a seed
    counter  (low, high) 32 bits of a block's number, a stream, 0

A seed has several streams, so that each use of it has numbers of its own.
"""

from __future__ import annotations

import numpy as np

CROP, POSTERIOR, NOISE, ORDER, CAPTION = 0, 1, 2, 3, 4
"""Streams: the crop's position; the sample of the autoencoder's posterior; the noise of a draw, or
that a picture is painted from; the order of draws; which caption a draw has."""
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_UNIT = 2.0**-32


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 of every counter.

    Args:
        counter: [N, 4] whole numbers below 2**32.
        key: two of them.

    Returns:
        [N, 4] uint32.

    Example:
        >>> [hex(word) for word in philox(np.zeros((1, 4)), (0, 0))[0]]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = np.asarray(counter, np.uint64).T
    low, high = map(np.uint64, key)
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (second >> _HALF) ^ b ^ low, (first >> _HALF) ^ d ^ high
        b, d = second & _LOW, first & _LOW
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def words(seed: int, stream: int, count: int) -> np.ndarray:
    """The first ``count`` words of a seed's stream, uint32.

    Args:
        seed: in 0 .. 2**64 - 1.
        stream: one of this module's.
        count: how many.
    """
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    streams = np.full_like(blocks, stream)
    counter = np.stack([blocks & _LOW, blocks >> _HALF, streams, np.zeros_like(blocks)], axis=1)
    return philox(counter, _key(seed)).reshape(-1)[:count]


def uniform(seed: int, stream: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float32: the upper 24 bits of each word, over 2**24, which is exact."""
    return (words(seed, stream, count) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32, in row-major order.

    Box and Muller's transform in float64, of the words (w, v) in pairs: the radius
    sqrt(-2 log((w + 1) / 2**32)) times cosine, then sine, of 2 pi v / 2**32. Languages whose
    logarithm or sine differ in the last bit of float64 agree after the rounding to float32, but for
    about one number in 10**8.

    Args:
        seed: in 0 .. 2**64 - 1.
        stream: one of this module's.
        shape: of the result.
    """
    count = int(np.prod(shape))
    pairs = words(seed, stream, count + count % 2).astype(np.float64).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log((pairs[:, 0] + 1.0) * _UNIT))
    angle = 2.0 * np.pi * _UNIT * pairs[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)[:count].astype(np.float32).reshape(shape)


def seed_of(seed: int, number: int) -> int:
    """The seed of draw ``number`` of a bank with ``seed``: of Philox at block ``number`` of the
    `ORDER` stream, the first word and the lower 21 bits of the second. So it is in 0 .. 2**53 - 1,
    which the numbers of every language hold.
    """
    counter = [[number & 0xFFFFFFFF, number >> 32, ORDER, 0]]
    low, high, *_ = map(int, philox(np.array(counter, np.uint64), _key(seed))[0])
    return low | (high & 0x1FFFFF) << 32


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Numbers 0 .. count - 1 in the order of an epoch, int64 [count]: sorted by the words of the
    `ORDER` stream of `seed_of` the epoch, the smaller number first where two are equal.

    Args:
        count: of draws.
        seed: of the plan.
        epoch: from 0.
    """
    return np.argsort(words(seed_of(seed, epoch), ORDER, count), kind="stable")


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32
