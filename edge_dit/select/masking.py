"""Hides the text from the image in some blocks, for block selection (docs/method.md, Eq. 2).

In a masked block no image query sees a text key.

- With cross-attention, all of its output comes from the text, so the output is set to zero. Masking
  every key instead would add one bias to all of them, which softmax ignores.
- With joint attention, text keys are masked for image queries. Text queries and attention from
  image to image stay as they are. The mask is added where torch computes attention, so that no
  attention processor of diffusers is copied (SD3's accepts no mask).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edge_dit.errors import BadInput
from edge_dit.models.families.family import Family
from edge_dit.models.families.parts.joined import Joined

TEXT_FIRST = {"flux": True, "sd3": False, "qwen_image": True, "chroma": True, "flux2": True}
"""Family of two streams -> whether its blocks attend to [text, image], else [image, text]. Read off
the attention processors of diffusers 0.42.
"""


@contextmanager
def text_masked(family: Family, model: nn.Module, blocks: Iterable[int]) -> Iterator[None]:
    """Mask the text from the image in some blocks of a model while a ``with`` block runs.

        with text_masked(family, pipeline.transformer, range(4)):
            pictures = family.sample(pipeline, "a sks toy", 512, [1])

    Args:
        family: of the model.
        model: the transformer, with or without LoRA.
        blocks: numbers of the blocks, counted over all containers in order of execution.

    Raises:
        BadInput: a masked block runs whose attention is not computed by torch's
            ``scaled_dot_product_attention``; or a batch has texts of several lengths, where the
            model has them in one sequence with the image.
    """
    everything = list(family.blocks(model).values())
    mask = _hide_text_keys if family.joint else _silence_cross_attention
    with ExitStack() as stack:
        if family.joint:
            stack.callback(_count_image_tokens(family, model))
        for number in sorted(set(blocks)):
            mask(family, everything[number], stack)
        yield


def _silence_cross_attention(family: Family, block: nn.Module, stack: ExitStack) -> None:
    def silence(_: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    stack.callback(block.get_submodule("attn2").register_forward_hook(silence).remove)


def _count_image_tokens(family: Family, model: nn.Module) -> Callable[[], None]:
    """Have `Family.image` set by the model's own forward too; undone by what is returned."""

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        lengths: list[int] = []
        if isinstance(family, Joined) and family.text_first:
            lengths = family.text_lengths(call)
        if len(set(lengths)) > 1:
            raise BadInput(
                "batch",
                found=f"texts of {' and '.join(map(str, lengths))} tokens",
                expected="texts of one length: each row has the image after its text",
                remedy="mask the text for one prompt at a time",
            )
        family.image = family.image_tokens(model, call)

    return model.register_forward_pre_hook(count, with_kwargs=True).remove


def _hide_text_keys(family: Family, block: nn.Module, stack: ExitStack) -> None:
    hiding = _HideTextKeys(family, inspect.signature(block.forward))
    before = block.register_forward_pre_hook(hiding.enter, with_kwargs=True)
    # always_call: also when the block raises. torch does not call it after Ctrl-C, so the mode is
    # left once more at the end.
    after = block.register_forward_hook(hiding.exit, always_call=True)
    for undo in (hiding.leave, before.remove, after.remove):
        stack.callback(undo)


class _HideTextKeys(TorchFunctionMode):
    """Masks text keys from image queries in one block's joint attention while that block runs.

    Args:
        family: of the model.
        signature: of the block's ``forward``.
    """

    def __init__(self, family: Family, signature: inspect.Signature) -> None:
        super().__init__()
        self.family, self.signature = family, signature
        joined = isinstance(family, Joined)
        self.text_first = family.text_first if joined else TEXT_FIRST[family.name]
        self.open, self.masked = False, 0
        self.image = self.text = 0

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start masking; called before the block, whose arguments tell the numbers of tokens."""
        call = self.signature.bind(*args, **kwargs).arguments
        text = call.get("encoder_hidden_states")
        if isinstance(self.family, Joined) or text is None:
            self.image = self.family.image
            self.text = call[self.family.streams[-1]].shape[1] - self.image
        else:
            self.image = call["hidden_states"].shape[1]
            self.text = text.shape[1]
        self.masked = 0
        self.__enter__()
        self.open = True

    def exit(self, block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """Stop masking; called after the block, which must have attended jointly once."""
        self.leave()
        if output is not None and self.masked != 1:
            raise BadInput(
                type(block).__name__,
                found=f"{self.masked} joint attentions computed by torch",
                expected="1: text is masked in torch's scaled_dot_product_attention",
                remedy="unset DIFFUSERS_ATTN_BACKEND, or set it to native",
            )

    def leave(self) -> None:
        """Stop masking, unless that was done before."""
        if self.open:
            self.open = False
            self.__exit__(None, None, None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        """Torch's attention, masked where the sequence is text and image together.

        Args:
            query: [B, heads, S, d], or of the image alone.
            key, value: [B, heads, S, d].
            attn_mask: passed by the block, [S, S] or of a shape that broadcasts to it.
            rest: other arguments of torch's function.
        """
        # SD3.5 also attends over the image alone, in attn2.
        if key.shape[-2] == self.text + self.image:
            self.masked += 1
            attn_mask = self.merged(attn_mask, query.shape[-2], query.device)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, **rest
        )

    def merged(self, attn_mask: Tensor | None, queries: int, device: torch.device) -> Tensor:
        """The block's own mask with text keys hidden from image queries.

        Args:
            attn_mask: bool (True: the query sees the key) or float (added to the scores); None if
                the block passes none.
            queries: number Q of queries: S, or of the image alone.
            device: of the attention.

        Returns:
            bool [Q, S] where the block passes no mask, else of the mask's dtype.
        """
        text = torch.arange(self.text + self.image, device=device)
        text = text < self.text if self.text_first else text >= self.image
        rows = text if queries == len(text) else torch.zeros(queries, device=device) > 0
        seen = rows[:, None] | ~text[None, :]
        if attn_mask is None:
            return seen
        if attn_mask.dtype == torch.bool:
            return attn_mask & seen
        return attn_mask.masked_fill(~seen, float("-inf"))
