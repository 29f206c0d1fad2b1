"""What a configuration may say: every key of a family's classes, and what is done about the rest.

A key that is not understood is never passed over. diffusers ignores one that its class does not
know, with a warning, and builds another model than the one that was trained.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput, raise_any
from edge_dit.models.components import REMEDY
from edge_dit.models.pipeline import quiet

OTHER = "use a checkpoint without it"
DEEPEST = 1000
"""Most blocks of a model; public ones have fewer than a hundred."""
WIDEST = 65536
"""Most channels, heads or features; more would only fill the memory."""
LARGEST = 1024
"""Most latents or tokens a side in a table of positions; public models have at most 384."""
MOST_PLACES = 1 << 17
"""Most positions of a table of rotations; public models have at most a thousand or two."""
MOST_STEPS = 1_000_000
"""Most noise levels of a scheduler; public ones have a thousand."""


@dataclass(frozen=True)
class Rule:
    """What the value of a key may be.

    Attributes:
        expected: the values that are accepted, in words.
        accepts: whether a value is one of them.
        why: other values are not implemented; empty where they are no values at all.
    """

    expected: str
    accepts: Callable[[Any], bool]
    why: str = ""


Rules = Mapping[str, Rule]
"""Key of a configuration -> its rule."""
Misfits = Iterator[tuple[str, str]]
"""Keys whose values do not fit those of others, each with the value it should have, in words."""


def whole(most: int = WIDEST, least: int = 1) -> Rule:
    """A whole number."""
    return Rule(
        f"a whole number, {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def positive(most: float = 1e6) -> Rule:
    """A number above zero."""
    return Rule(
        f"a number above 0, at most {most:g}",
        lambda value: _is_number(value) and 0 < value <= most,
    )


def finite() -> Rule:
    """A finite number."""
    return Rule("a number", _is_number)


def flag() -> Rule:
    """True or false."""
    return one_of(False, True)


def one_of(*values: Any, why: str = "") -> Rule:
    """One of a few values; ``why`` the others are not implemented."""
    return Rule(
        " or ".join(_shown(value) for value in values),
        lambda value: any(_same(value, known) for known in values),
        why,
    )


def optional(rule: Rule) -> Rule:
    """What ``rule`` says, or null."""
    return replace(
        rule,
        expected=f"{rule.expected}, or null",
        accepts=lambda value: value is None or rule.accepts(value),
    )


def several(rule: Rule, least: int = 0) -> Rule:
    """A list, each value of which ``rule`` accepts."""
    return replace(
        rule,
        expected=f"a list of {least} or more values, each {rule.expected}",
        accepts=lambda value: (
            isinstance(value, (list, tuple))
            and least <= len(value) <= DEEPEST
            and all(map(rule.accepts, value))
        ),
    )


def lengths(count: int) -> Rule:
    """Numbers of positions in ``count`` tables."""
    return Rule(
        f"{count} whole numbers, each 1 to {MOST_PLACES}",
        lambda value: (
            isinstance(value, (list, tuple))
            and len(value) == count
            and all(type(one) is int and 1 <= one <= MOST_PLACES for one in value)
        ),
    )


def axes(count: int = 3) -> Rule:
    """Widths of the rotary axes: time or layer, rows, columns; the place in the text."""
    return Rule(
        f"{'three' if count == 3 else 'four'} even numbers above 0",
        lambda value: (
            isinstance(value, (list, tuple))
            and len(value) == count
            and all(type(width) is int and 0 < width <= WIDEST for width in value)
            and not any(width % 2 for width in value)
        ),
    )


def idle() -> Rule:
    """Any value: the key has no effect on a model of this family."""
    return Rule("any value", lambda _: True)


def no_dropout() -> Rule:
    """Zero: exported graphs draw no random numbers."""
    return Rule(
        "0",
        lambda value: _is_number(value) and value == 0,
        "training graphs draw no random numbers",
    )


def check(path: Path, config: Mapping[str, Any], rules: Rules, known: Mapping[str, Any]) -> None:
    """Raise `BadInput` for every key whose value is not accepted.

    Private keys are left alone, and quantization_config, which is no argument of the class.

    Args:
        path: of the configuration.
        config: read from it.
        rules: of the family.
        known: default values of the class that is built. Keys without a rule must have them.
    """
    faults = []
    for key, value in config.items():
        # diffusers drops the keys that _use_default_values names
        private = key.startswith("_") and key != "_use_default_values"
        if private or key == "quantization_config":
            continue
        if key in rules:
            if not rules[key].accepts(value):
                faults.append(_fault(path, key, value, rules[key]))
        elif key not in known or not _same(value, known[key]):
            faults.append(_unknown(path, key, value, known))
    raise_any(path, faults)


def check_fit(path: Path, config: Mapping[str, Any], misfits: Misfits) -> None:
    """Raise `BadInput` for keys whose values contradict each other.

    Args:
        path: of the configuration.
        config: read from it.
        misfits: what is wrong with it.
    """
    raise_any(
        path,
        [
            BadInput(
                path,
                found=f"{key} = {_shown(config[key])}",
                expected=expected,
                remedy=REMEDY,
            )
            for key, expected in misfits
        ],
    )


@cache
def defaults_of(name: str) -> dict[str, Any]:
    """Keys of the configuration of a class of diffusers, with their default values.

    Raises:
        BadInput: the installed diffusers has no such class.
    """
    with quiet():
        import diffusers

        kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_config"):
        raise BadInput(
            "diffusers",
            found=f"no class {name!r:.80} with a configuration",
            expected="a class of the installed diffusers",
            remedy=REMEDY,
        )
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _fault(path: Path, key: str, value: Any, rule: Rule) -> BadInput:
    found = f"{key} = {_shown(value)}"
    if not rule.why:
        return BadInput(path, found=found, expected=rule.expected, remedy=REMEDY)
    return BadInput(
        path, found=f"{found}: not implemented", expected=f"{rule.expected}: {rule.why}",
        remedy=OTHER,
    )  # fmt: skip


def _unknown(path: Path, key: str, value: Any, known: Mapping[str, Any]) -> BadInput:
    if key in known:
        expected = f"{_shown(known[key])}, its default: edge-dit does not know this key"
    else:
        expected = "no such key: the installed diffusers would ignore it and build another model"
    return BadInput(
        path, found=f"{key} = {_shown(value)}: not implemented", expected=expected, remedy=OTHER
    )


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _same(value: Any, other: Any) -> bool:
    """Whether two values are the same to Python and to JSON: 1 is not true, a tuple is a list."""
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(_same, value, other))
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _shown(value: Any) -> str:
    """A value as JSON has it, cut to a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
