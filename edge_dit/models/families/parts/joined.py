"""Families whose blocks read one sequence of text and image: single-stream transformers.

Outside of a block the sequence is a `State` of image tokens and the rest, as in the other families,
so that banks, residuals and heads need not know of it. `Joined.run_block` joins the two, runs the
block and parts them again.

What is before the blocks (embeddings, refiners, fusion of text: the prelude) is frozen and upstream
of everything that trains. It runs within `Family.begin`, once a draw, and is part of the exact
entry state.

Text of a job is padded to its longest prompt, because exported graphs have fixed shapes. Where the
stock forward drops padding (`Joined.drops_padding`), a block in torch gets the tokens that are
there, as in the stock forward and to the bit. A traced block gets all, and a mask that hides
padding: the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from edge_dit.contract.names import read_by
from edge_dit.models.families.family import Family, Grid, State

PROMPT_MASK = "encoder_attention_mask"
"""Of an encoded prompt of families that drop padding, [1, L]: 1 for a token, 0 for padding."""
TEXT_MASK = "text_mask"
"""Conditioning [1, T] of families that drop padding: 1 for a token, 0 for padding after it."""
ROPE = "rope"
"""Conditioning [S, d]: rotations of all tokens in the sequence's order, real and imaginary parts in
turn.
"""


class Joined(Family):
    """A family with one sequence. Its `State` holds N image tokens and T others: text, and tokens
    that fill the sequence up.
    """

    joint = True
    text_first: ClassVar[bool] = True
    """Whether the sequence is [text, image], else [image, text]."""
    stream: ClassVar[str] = "hidden_states"
    """Argument of a block that takes the sequence."""
    drops_padding: ClassVar[bool] = False
    """Whether the stock forward drops padding; `conditioning` then has `TEXT_MASK`."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The one sequence."""
        return (self.stream,)

    # ---------------------------------------------------------------- sequence

    def text_lengths(self, inputs: Mapping[str, Any]) -> list[int]:
        """Numbers of text tokens in the rows of a batch of the stock forward.

        Args:
            inputs: of the stock forward.
        """
        return [inputs["encoder_hidden_states"].shape[1]]

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """The sequence of image and text tokens, which are in the last axis but one."""
        return torch.cat([text, image] if self.text_first else [image, text], dim=-2)

    def part(self, sequence: Tensor, image: int) -> tuple[Tensor, Tensor]:
        """Image and text tokens of a sequence; the inverse of `join`.

        Args:
            sequence: [..., S, D].
            image: number of image tokens.
        """
        text = sequence.shape[-2] - image
        if self.text_first:
            return sequence[..., text:, :], sequence[..., :text, :]
        return sequence[..., :image, :], sequence[..., image:, :]

    def entry(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        call: Mapping[str, Any],
        cond: Mapping[str, Tensor],
    ) -> State:
        """The first block's sequence, parted."""
        image, text = self.part(call[self.stream], self.image_tokens(model, inputs))
        return self._padded(image, text, cond)

    # ---------------------------------------------------------------- blocks

    def run_block(
        self, name: str, block: nn.Module, state: State, cond: Mapping[str, Tensor], grid: Grid
    ) -> State:
        """The state after a block."""
        cond = read_by(name, cond)
        assert state.text is not None
        sequence = self.join(state.image, state.text[:, : self.seen(cond)])
        self.image = state.image.shape[1]
        after = block(**{self.stream: sequence}, **self.arguments(cond, grid))
        return self._padded(*self.part(after, self.image), cond)

    def seen(self, cond: Mapping[str, Tensor]) -> int | None:
        """Number of text tokens that a block gets; None for all."""
        if self.traced or not self.drops_padding:
            return None
        return int(cond[TEXT_MASK].sum())

    def rotations(self, cond: Mapping[str, Tensor], image: int) -> Tensor:
        """`ROPE` of the tokens that a block gets: complex, unless `traceable`.

        Args:
            cond: conditioning.
            image: number of image tokens.
        """
        rope = cond[ROPE]
        if not self.traced:
            rope = torch.view_as_complex(rope.unflatten(-1, (-1, 2)))
            ours, text = self.part(rope, image)
            rope = self.join(ours, text[: self.seen(cond)])
        return rope

    def sequence_mask(self, cond: Mapping[str, Tensor], image: int) -> Tensor | None:
        """What a block's tokens see, bool [1, S]; None where they see all."""
        if not self.traced:
            return None
        everything = torch.ones(1, image, 1)
        return self.join(everything, cond[TEXT_MASK].unsqueeze(-1)).squeeze(-1) > 0.5

    def _padded(self, image: Tensor, text: Tensor, cond: Mapping[str, Tensor]) -> State:
        """A state of text tokens that a block gets or gives; padding that it drops is zero."""
        if not self.drops_padding:
            return State(image, text)
        mask = cond[TEXT_MASK].unsqueeze(-1)
        return State(image, pad(text, (0, 0, 0, mask.shape[1] - text.shape[1])) * mask)
