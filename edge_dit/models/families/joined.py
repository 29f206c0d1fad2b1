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

from edge_dit.models.families.family import Family, Grid, State

TEXT_MASK = "encoder_attention_mask"
"""Input and conditioning [1, T] of families that drop padding: 1 for a text token, 0 for padding,
which comes after all text.
"""
ROPE = "rope"
"""Conditioning [S, d / 2, 2]: rotations of all tokens in the sequence's order, real and imaginary
parts.
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

    image: int = 0
    """Number of image tokens in the sequence of the block that ran last."""

    # ---------------------------------------------------------------- sequence

    def image_tokens(self, model: Any, inputs: Mapping[str, Any]) -> int:
        """Number of image tokens in the sequence.

        Args:
            model: the transformer; only its configuration is read.
            inputs: of the stock forward.
        """
        latents = inputs["hidden_states"]
        if latents.ndim == 3:
            return latents.shape[1]
        return latents.shape[-2] * latents.shape[-1] // model.config.patch_size**2

    def text_lengths(self, inputs: Mapping[str, Any]) -> list[int]:
        """Number of text tokens that a batch of the stock forward has in each row's sequence.

        Args:
            inputs: of the stock forward.
        """
        if self.drops_padding:
            return inputs[TEXT_MASK].sum(1).tolist()
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

    def entry(self, model: Any, inputs: Mapping[str, Any], call: Mapping[str, Any]) -> State:
        """The first block's sequence, parted."""
        state = State(*self.part(call[self.stream], self.image_tokens(model, inputs)))
        return self._padding_zeroed(state, inputs)

    # ---------------------------------------------------------------- blocks

    def run_block(
        self, block: nn.Module, state: State, cond: Mapping[str, Tensor], grid: Grid
    ) -> State:
        """The state after ``block``."""
        assert state.text is not None
        total, seen = state.text.shape[1], self.seen(cond)
        sequence = self.join(state.image, state.text[:, :seen])
        self.image = state.image.shape[1]
        after = block(**{self.stream: sequence}, **self.arguments(cond, grid))
        image, text = self.part(after, self.image)
        if self.traced:
            return self._padding_zeroed(State(image, text), cond)
        return State(image, pad(text, (0, 0, 0, total - text.shape[1])))

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
            rope = torch.view_as_complex(rope)
            ours, text = self.part(rope, image)
            rope = self.join(ours, text[: self.seen(cond)])
        return rope

    def sequence_mask(self, cond: Mapping[str, Tensor], image: int) -> Tensor | None:
        """What a block's tokens see, bool [1, S]; None where they see all."""
        if not self.traced:
            return None
        everything = torch.ones(1, image, 1)
        return self.join(everything, cond[TEXT_MASK].unsqueeze(-1)).squeeze(-1) > 0.5

    def _padding_zeroed(self, state: State, cond: Mapping[str, Tensor]) -> State:
        """The state with zeros for padding, where the stock forward has none."""
        if not self.drops_padding or state.text is None:
            return state
        return State(state.image, state.text * cond[TEXT_MASK].unsqueeze(-1))
