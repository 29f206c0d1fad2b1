"""What a device has to spare: the budget of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from edge_dit.text import size


@dataclass(frozen=True)
class Limits:
    """What a device has to spare for training. inf means no limit.

    Attributes:
        ram: bytes of memory of a training process: anonymous memory and file pages.
        flash: bytes of bundle and bank.
        seconds: time of a training step.
    """

    ram: float = inf
    flash: float = inf
    seconds: float = inf

    def in_words(self) -> str:
        """The limits for people: "3 GiB of memory and 5 s a step"."""
        words = []
        if self.ram < inf:
            words.append(f"{size(self.ram)} of memory")
        if self.flash < inf:
            words.append(f"{size(self.flash)} of flash")
        if self.seconds < inf:
            words.append(f"{self.seconds:g} s a step")
        return " and ".join(words) or "no limits"


NO_LIMITS = Limits()
