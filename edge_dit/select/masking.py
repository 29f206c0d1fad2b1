"""Hiding the text from the image in some blocks, for block selection (docs/method.md, Eq. 2).

"Masked" means that in those blocks image queries see no text key. In families with cross-attention
the whole of it is the text's contribution, so its output becomes zero: a mask of zeros would add
one bias to every key, which softmax ignores. In joint attention the keys are masked, text queries
and image-to-image attention stay as they are; that is done where torch computes attention, so no
attention processor of diffusers is copied (SD3's would take no mask).
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

TEXT_FIRST = {"flux": True, "sd3": False, "qwen_image": True}
"""Whether a joint family attends over [text, image] or [image, text] (attention processors of
diffusers 0.42)."""


@contextmanager
def text_masked(family: Family, model: nn.Module, blocks: Iterable[int]) -> Iterator[None]:
    """While it is open, image tokens get nothing from the text in ``blocks``.

    Args:
        family: of the model.
        model: the transformer, with or without LoRA.
        blocks: numbers of the blocks, over all containers in order of execution.

    Raises:
        BadInput: when a block runs whose attention torch does not compute.
    """
    everything = list(family.blocks(model).values())
    mask = _hide_text_keys if family.joint else _silence_cross_attention
    with ExitStack() as stack:
        for number in sorted(set(blocks)):
            mask(family, everything[number], stack)
        yield


def _silence_cross_attention(family: Family, block: nn.Module, stack: ExitStack) -> None:
    def silence(_: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    stack.callback(block.get_submodule("attn2").register_forward_hook(silence).remove)


def _hide_text_keys(family: Family, block: nn.Module, stack: ExitStack) -> None:
    hiding = _HideTextKeys(TEXT_FIRST[family.name], inspect.signature(block.forward))
    before = block.register_forward_pre_hook(hiding.enter, with_kwargs=True)
    # Also when the block raises; what torch does not count as an error, Ctrl-C, is for `leave`.
    after = block.register_forward_hook(hiding.exit, always_call=True)
    for undo in (hiding.leave, before.remove, after.remove):
        stack.callback(undo)


class _HideTextKeys(TorchFunctionMode):
    """Masks text keys from image queries in a block's joint attention; open while the block runs.

    Args:
        text_first: the order of the joint sequence.
        signature: of the block's forward.
    """

    def __init__(self, text_first: bool, signature: inspect.Signature) -> None:
        super().__init__()
        self.text_first, self.signature = text_first, signature
        self.open, self.masked = False, 0
        self.image = self.text = 0

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the block: count its tokens."""
        call = self.signature.bind(*args, **kwargs).arguments
        self.image = call["hidden_states"].shape[1]
        self.text = call["encoder_hidden_states"].shape[1]
        self.masked = 0
        self.__enter__()
        self.open = True

    def exit(self, block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """After the block; it must have attended jointly once."""
        self.leave()
        if output is not None and self.masked != 1:
            raise BadInput(
                type(block).__name__,
                found=f"{self.masked} joint attentions computed by torch",
                expected="1: text is masked in torch's scaled_dot_product_attention",
                remedy="unset DIFFUSERS_ATTN_BACKEND, or set it to native",
            )

    def leave(self) -> None:
        """Stop, if that has not been done."""
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
        """Attention with query, key, value [B, heads, S, d], masked if S is text and image."""
        if query.shape[-2] == self.text + self.image:  # SD3.5's attn2 is over the image alone
            self.masked += 1
            attn_mask = self.merged(attn_mask, query.device)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, **rest
        )

    def merged(self, attn_mask: Tensor | None, device: torch.device) -> Tensor:
        """Boolean [S, S] (True: may see), or the mask that was passed with those keys hidden."""
        text = torch.arange(self.text + self.image, device=device)
        text = text < self.text if self.text_first else text >= self.image
        seen = text[:, None] | ~text[None, :]
        if attn_mask is None:
            return seen
        if attn_mask.dtype == torch.bool:
            return attn_mask & seen
        return attn_mask.masked_fill(~seen, float("-inf"))
