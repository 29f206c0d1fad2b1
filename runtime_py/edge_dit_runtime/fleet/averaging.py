"""What devices send of a LoRA, so that the mean of it is the mean of what they learned.

A device learned the matrix B A. The mean of B times the mean of A is another matrix: it has
products of one device's B with another's A. So either

    product    the matrices B A are sent and averaged. Their mean has a higher rank than the LoRA;
               the closest matrix of the LoRA's rank (truncated SVD) is trained on.
    fixed-a    A stays what the bundle has (FFA-LoRA, arXiv 2403.12313), and B is sent. The mean is
               exact, messages are small, and noise for privacy is added to fewer numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from edge_dit.errors import BadInput

How = Literal["product", "fixed-a"]
PRODUCT: How = "product"
FIXED: How = "fixed-a"
A, B = ".lora_A.weight", ".lora_B.weight"
Tensors = Mapping[str, np.ndarray]


def check_how(how: str) -> How:
    """``how`` as one of `How`.

    Raises:
        BadInput: it is none.
    """
    if how not in get_args(How):
        raise BadInput("averaging", found=how, expected=" or ".join(get_args(How)))
    return FIXED if how == FIXED else PRODUCT


def sent(adapter: Tensors, how: How) -> dict[str, np.ndarray]:
    """What a device sends of its adapter.

    Args:
        adapter: LoRA tensors by diffusers name; A is [rank, in], B [out, rank], each with two more
            sides of 1 where it is a convolution's.
        how: see the module.

    Returns:
        float32: [out, in] by module, or the tensors B by name.
    """
    if how == FIXED:
        return {name: value for name, value in adapter.items() if name.endswith(B)}
    return {
        name.removesuffix(A): _flat(adapter[name.removesuffix(A) + B]) @ _flat(value)
        for name, value in adapter.items()
        if name.endswith(A)
    }


def received(mean: Tensors, base: Tensors, how: How) -> dict[str, np.ndarray]:
    """The adapter to train on, or to keep, of a mean of what was `sent`.

    Args:
        mean: as `sent` names it.
        base: the bundle's adapter: shapes, and the A that stays or that training begins with.
        how: see the module.

    Raises:
        BadInput: ``mean`` is of another adapter.
    """
    wanted = {name: value.shape for name, value in sent(base, how).items()}
    if {name: value.shape for name, value in mean.items()} != wanted:
        raise BadInput(
            "adapter",
            found="tensors of other names or shapes",
            expected="those of this device's bundle",
            remedy="give all devices and the server the same bundle",
        )
    if how == FIXED:
        return {**base, **mean}
    adapter = dict(base)
    for module, product in mean.items():
        first, second = base[module + A], base[module + B]
        if product.any():
            # float64: what float32 rounds here, the next round's training makes larger
            wide = product.astype(np.float64)
            a, b = factors(wide, len(first), float(np.linalg.norm(first)))
            adapter[module + A], adapter[module + B] = (
                a.reshape(first.shape),
                b.reshape(second.shape),
            )
        else:  # nothing was learned yet: every A is a factor
            adapter[module + B] = np.zeros_like(second)
    return {name: value.astype(np.float32) for name, value in adapter.items()}


def factors(product: np.ndarray, rank: int, norm: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the matrix of a rank that is closest to ``product`` (Eckart and Young).

    The rows of A are orthogonal and of one length, as those of a new LoRA nearly are, so that steps
    of one learning rate stay as large as they were.

    Args:
        product: [out, in].
        rank: of A and B.
        norm: Frobenius norm of A.

    Returns:
        A [rank, in] and B [out, rank].
    """
    left, sizes, right = np.linalg.svd(product, full_matrices=False)
    rank_here = min(rank, len(sizes))
    length = norm / rank**0.5
    a = np.zeros((rank, product.shape[1]), product.dtype)
    b = np.zeros((product.shape[0], rank), product.dtype)
    a[:rank_here] = length * right[:rank_here]
    b[:, :rank_here] = left[:, :rank_here] * sizes[:rank_here] / length
    return a, b


def _flat(value: np.ndarray) -> np.ndarray:
    return value.reshape(value.shape[:2])
