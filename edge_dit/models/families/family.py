"""The interface between edge-dit and a kind of Diffusion Transformer.

A model is an ordered list of blocks between a beginning (embeddings) and a head. Between blocks
flows a `State`; all blocks read the same conditioning tensors; the head reads image tokens only,
so a tail residual is image tokens only.

Nothing of a model's forward is repeated here: the beginning is the stock forward itself with
stand-ins for its blocks, which note what the first block is called with; blocks are the model's own
modules. Only the few lines after the last block (`Family.head`) are written out, and the tests hold
them against the stock forward to the bit.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from edge_dit.errors import BadInput
from edge_dit.models.objective import Objective
from edge_dit.models.pipeline import check_vocabulary, quiet

Grid = tuple[int, int]
"""Token rows and columns."""
Prompt = dict[str, Tensor]
"""An encoded prompt: arguments of the stock forward that depend on the text alone."""
Conditioning = dict[str, Tensor]
"""What every block and the head read besides the state, by name."""
INCOMPLETE = "the folder is not a whole pipeline; save or download it again"


class State(NamedTuple):
    """What flows between blocks: image tokens [1, N, D], and in joint-attention families text
    tokens [1, L, D].
    """

    image: Tensor
    text: Tensor | None = None


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a checkpoint: number of blocks, and pixels per token side."""

    layers: int
    multiple: int


class _StandIn(nn.Module):
    """Takes the place of a block of class ``kind``: notes its call, changes nothing."""

    def __init__(self, kind: type, joint: bool, call: dict[str, Any]) -> None:
        super().__init__()
        self.signature = inspect.signature(kind.forward)  # type: ignore[attr-defined]
        self.joint, self.call = joint, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The state it was called with."""
        bound = self.signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if not self.call:
            self.call.update(bound.arguments)
        image = bound.arguments["hidden_states"]
        return (bound.arguments["encoder_hidden_states"], image) if self.joint else image


class Family:
    """One kind of Diffusion Transformer. A sub-class fills in what differs."""

    name: ClassVar[str]
    transformer: ClassVar[str]
    """Class of the transformer in diffusers."""
    autoencoder: ClassVar[str]
    """Class of the autoencoder in diffusers."""
    containers: ClassVar[dict[str, str]] = {"transformer_blocks": "num_layers"}
    """Block containers of the model in order of execution -> configuration key of their length."""
    joint: ClassVar[bool] = False
    """Whether text tokens flow through the blocks beside the image's."""
    watched: ClassVar[str] = ""
    """A sub-module of the model whose output `conditioning` needs."""
    head_modules: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    """Attributes of the model that `head` reads."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Modules within a block that carry LoRA by default, as in the stock training script."""
    text_output: ClassVar[tuple[str, ...]] = ()
    """Modules that only feed a block's text output: behind the last trained block nothing that is
    trained reads it, so they carry no LoRA there.
    """
    before_relu: ClassVar[tuple[str, ...]] = ()
    """Modules within a block whose output meets a ReLU, or a norm and then a ReLU: where it is zero
    the gradient jumps.
    """
    per_prompt: ClassVar[tuple[str, ...]]
    """Conditioning that the prompt alone decides: a bank stores it once per prompt."""
    sample_options: ClassVar[dict[str, Any]] = {}
    """How `sample` calls the pipeline."""

    # ---------------------------------------------------------------- configuration

    def facts(self, folder: Path) -> Facts:
        """Read a pipeline folder's configurations; no weights are loaded.

        Raises:
            BadInput: a part is missing or of another class.
        """
        config = self.config(folder)
        return Facts(len(self.block_names(config)), self.multiple(config, self.vae_config(folder)))

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformer's configuration."""
        return read_config(folder / "transformer" / "config.json", self.transformer)

    def vae_config(self, folder: Path) -> dict[str, Any]:
        """The autoencoder's configuration."""
        return read_config(folder / "vae" / "config.json", self.autoencoder)

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token: the autoencoder's downsampling times the patch size."""
        return 2 ** (len(vae["block_out_channels"]) - 1) * config["patch_size"]

    def block_names(self, config: Mapping[str, Any]) -> list[str]:
        """Names of the blocks within the model, in order of execution."""
        return [
            f"{container}.{number}"
            for container, key in self.containers.items()
            for number in range(config[key])
        ]

    def objective(self, scheduler: Mapping[str, Any]) -> Objective:
        """What the model is trained to predict, from the scheduler's configuration."""
        raise NotImplementedError

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the text of a job with these prompts, in tokens.

        Raises:
            BadInput: a prompt the pipeline would cut off.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- transformer

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The blocks by name, in order of execution."""
        return {
            f"{container}.{number}": block
            for container in self.containers
            for number, block in enumerate(getattr(model, container))
        }

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward, as the pipeline's loop passes them.

        Args:
            model: the transformer; only its configuration is read.
            latents: noised latents as `encode_image` shapes them.
            timestep: as `Objective.timestep` gives it.
            prompt: as `encode_prompts` gives it.
            grid: token rows and columns.
        """
        raise NotImplementedError

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """Conditioning tensors from the arguments of a block and the output of `watched`."""
        raise NotImplementedError

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Arguments of a block besides the state: the way back from `conditioning`."""
        raise NotImplementedError

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """From the last image tokens [1, N, D] to the stock forward's output; ``model`` needs only
        `head_modules` and ``config``.
        """
        raise NotImplementedError

    def learned(self, prediction: Tensor) -> Tensor:
        """The part of the model's output that the loss is about."""
        return prediction

    @torch.no_grad()
    def begin(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        """The state entering the first block, and the conditioning of all.

        Args:
            model: the transformer; its blocks do not run, they may lie on the meta device.
            inputs: as `inputs` gives them.
        """
        call: dict[str, Any] = {}
        seen: list[Any] = []
        handle = None
        if self.watched:
            watched: Any = getattr(model, self.watched)
            handle = watched.register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            with self._without_blocks(model, call):
                model(**inputs, return_dict=False)
        finally:
            if handle is not None:
                handle.remove()
        if seen:
            call[self.watched] = seen[0]
        text = call["encoder_hidden_states"] if self.joint else None
        return State(call["hidden_states"], text), self.conditioning(call)

    @contextmanager
    def _without_blocks(self, model: nn.Module, call: dict[str, Any]) -> Iterator[None]:
        kept = {name: getattr(model, name) for name in self.containers}
        for name, blocks in kept.items():
            # As many as there are blocks, for a forward may look at positions.
            stand_ins = [_StandIn(type(block), self.joint, call) for block in blocks]
            setattr(model, name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            for name, blocks in kept.items():
                setattr(model, name, blocks)

    def run_block(
        self, block: nn.Module, state: State, cond: Mapping[str, Tensor], grid: Grid
    ) -> State:
        """One block."""
        arguments = self.arguments(cond, grid)
        if not self.joint:
            return State(block(hidden_states=state.image, **arguments))
        text, image = block(
            hidden_states=state.image, encoder_hidden_states=state.text, **arguments
        )
        return State(image, text)

    def traceable(self) -> AbstractContextManager[None]:
        """While it is open, `run_block` keeps to operations that every target has."""
        return nullcontext()

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents and a prompt of the right shapes.

        Args:
            model: the transformer; only its configuration is read.
            grid: token rows and columns.
            text: text tokens.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- pipeline

    def encode_image(self, vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Clean latents of pixels [1, 3, H, W] in [-1, 1], scaled (and packed) as the pipeline's
        transformer takes them.

        Args:
            vae: the autoencoder.
            pixels: sides are multiples of `Facts.multiple`.
            generator: draws from the posterior, where the stock training script does.
        """
        raise NotImplementedError

    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Each prompt, exactly as the pipeline samples with it, ``tokens`` long.

        Args:
            pipeline: its transformer needs only a configuration.
            prompts: texts.
            tokens: as `text_tokens` gives it.
        """
        raise NotImplementedError

    def sample(self, pipeline: Any, prompt: str, side: int, seeds: list[int]) -> list[Any]:
        """Square pictures of ``side`` pixels (PIL), one a seed, by the stock pipeline."""
        return pipeline(
            [prompt] * len(seeds),
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self.sample_options,
        ).images


def read_config(path: Path, expected: str, *aliases: str) -> dict[str, Any]:
    """A part's config.json, of class ``expected`` or one of its other names.

    Raises:
        BadInput: unreadable, or of another class.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            path,
            found=f"unreadable ({error})",
            expected=f"the configuration of a {expected}",
            remedy=INCOMPLETE,
        ) from None
    if found not in (expected, *aliases):
        raise BadInput(path, found=f"class {found}", expected=expected, remedy=INCOMPLETE)
    return config


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration of a pipeline folder.

    Raises:
        BadInput: missing or unreadable.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            path,
            found=f"unreadable ({error})",
            expected="a scheduler's configuration",
            remedy=INCOMPLETE,
        ) from None


def tokenizer_of(folder: Path, part: str = "tokenizer") -> Any:
    """A tokenizer of a pipeline folder.

    Raises:
        BadInput: it cannot be loaded.
    """
    check_vocabulary(folder / part)
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder / part, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(
                folder / part,
                found=f"transformers cannot load it: {error}",
                expected="a tokenizer",
                remedy="save or download the pipeline again",
            ) from None


def longest(lengths: Mapping[str, int], limit: int) -> int:
    """The largest token count of prompts.

    Args:
        lengths: tokens of each prompt.
        limit: what the pipeline takes.

    Raises:
        BadInput: a prompt is longer than ``limit``.
    """
    for prompt, tokens in lengths.items():
        if tokens > limit:
            raise BadInput(
                f"prompt {prompt[:60]!r}...",
                found=f"{tokens} tokens",
                expected=f"at most {limit}, more would be cut off",
                remedy="shorten it",
            )
    return max(lengths.values())


def cut(prompt: Prompt, name: str, mask: str, tokens: int) -> Prompt:
    """A masked prompt cut to ``tokens``; nothing but padding may be lost.

    Args:
        prompt: with tensors ``name`` [1, L, D] and ``mask`` [1, L].
        name: the embeddings.
        mask: 1 for a token, 0 for padding.
        tokens: length to cut to.

    Raises:
        BadInput: the prompt has more tokens.
    """
    if prompt[mask][:, tokens:].any():
        raise BadInput(
            "prompt",
            found=f"{int(prompt[mask].sum())} tokens",
            expected=f"at most {tokens}, the longest prompt when the plan was made",
            remedy="plan again: edge-dit plan JOB -o plan.json",
        )
    return {**prompt, name: prompt[name][:, :tokens], mask: prompt[mask][:, :tokens]}


def unpatchify(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """Tokens [1, N, patch^2 C] to an image [1, C, rows patch, columns patch]."""
    rows, columns = grid
    tokens = tokens.reshape(1, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return tokens.reshape(1, -1, rows * patch, columns * patch)


def pack(latents: Tensor) -> Tensor:
    """Latents [1, C, h, w] to tokens [1, h w / 4, 4 C], as FLUX's and Qwen's pipelines pack."""
    _, channels, height, width = latents.shape
    latents = latents.reshape(1, channels, height // 2, 2, width // 2, 2)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(1, height * width // 4, channels * 4)
