"""The interface between edge-dit and a kind of Diffusion Transformer.

A model is an ordered list of blocks between a beginning (embeddings) and a head. A `State` flows
from block to block, and blocks read conditioning tensors besides (`read_by` says which). The head
reads image tokens only, so a tail residual covers image tokens only.

edge-dit does not copy a model's forward. The beginning is the stock forward itself, run with
stand-ins in place of the blocks; they record what the first block is called with. Refiners and
other modules before the blocks run there too. Blocks are the model's own modules. Only the few
lines after the last block (`Family.head`) are written again, and tests compare them with the stock
forward bit by bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edge_dit.contract.loop import Latents
from edge_dit.contract.names import read_by
from edge_dit.contract.noise import NOISE, normal
from edge_dit.contract.objective import Objective
from edge_dit.errors import BadInput
from edge_dit.models.components import check_vocabulary, read_json, refusing
from edge_dit.models.families.parts import switches
from edge_dit.models.families.parts.real import RealRotations
from edge_dit.models.families.parts.surroundings import Surroundings, are_given
from edge_dit.models.families.parts.switches import Misfits, Rules
from edge_dit.models.pipeline import quiet
from edge_dit.pictures.tiles import tiled

Grid = tuple[int, int]
"""Token rows and columns."""
Normal = Callable[[tuple[int, ...]], Tensor]
"""Gives standard normal numbers, float32, of a shape."""
Prompt = dict[str, Tensor]
"""An encoded prompt: the arguments of the stock forward that depend on the text alone."""
Conditioning = dict[str, Tensor]
"""Tensors that blocks and head read besides the state; `read_by` has the rule of their names."""
Call = Mapping[str, Any]
"""Arguments that a block was called with; those of the stock forward, where the block has none of
that name; and, under its name, the output of `Family.watched`.
"""
INCOMPLETE = "the folder is not a whole pipeline; save or download it again"


class State(NamedTuple):
    """What flows from block to block: image tokens [1, N, D] and, in joint-attention families,
    text tokens [1, L, D].
    """

    image: Tensor
    text: Tensor | None = None


class _StandIn(nn.Module):
    """Takes the place of a block: records its call and changes nothing.

    Its other attributes are the block's: Qwen-Image 2.1's forward looks at each block's attention.
    """

    def __init__(self, block: nn.Module, streams: tuple[str, ...], call: dict[str, Any]) -> None:
        super().__init__()
        self.signature = inspect.signature(type(block).forward)
        self.streams, self.call = streams, call
        self.replaced = (block,)  # in a tuple it is no part of the model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.replaced[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state it was called with."""
        bound = self.signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.call.update(bound.arguments)
        # Single-stream blocks of some families get text and image as one sequence.
        streams = (bound.arguments.get(name) for name in self.streams)
        first, *others = (stream for stream in streams if stream is not None)
        return (first, *others) if others else first


PIPELINE_ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "attention_mask": "prompt_attention_mask",
    "encoder_hidden_states_mask": "prompt_embeds_mask",
    "pooled_projections": "pooled_prompt_embeds",
}
"""Argument of a transformer -> of its pipeline's call."""
NEEDED = ("transformer", "vae", "scheduler", "text_encoder")
"""Components without which no pipeline works, besides `Family.tokenizer`."""


class Family:
    """One kind of Diffusion Transformer. A subclass fills in what differs."""

    name: ClassVar[str]
    transformer: ClassVar[str]
    """Class of the transformer in diffusers."""
    autoencoder: ClassVar[str]
    """Class of the autoencoder in diffusers."""
    tokenizer: ClassVar[str] = "tokenizer"
    """Component of the pipeline that turns text to tokens."""
    containers: ClassVar[dict[str, str]] = {"transformer_blocks": "num_layers"}
    """Attributes of the model that hold blocks, in order of execution -> configuration key of their
    length.
    """
    joint: ClassVar[bool] = False
    """Whether text tokens flow through the blocks beside the image tokens."""
    watched: ClassVar[str] = ""
    """Submodule of the model whose output `conditioning` needs."""
    head_modules: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    """Attributes of the model that `head` reads."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Modules within a block that carry LoRA by default, as in the stock training script."""
    text_output: ClassVar[tuple[str, ...]] = ()
    """Modules that only feed a block's text output. They carry no LoRA in the last trained block:
    nothing that is trained reads that output.
    """
    before_relu: ClassVar[tuple[str, ...]] = ()
    """Modules within a block whose output goes into a ReLU, directly or through a norm. The
    gradient jumps where that output is zero.
    """
    by_list: ClassVar[tuple[str, ...]] = ()
    """Names in `conditioning` whose tensors differ between the lists of blocks."""
    by_block: ClassVar[tuple[str, ...]] = ()
    """Names in `conditioning` whose tensors differ from block to block."""
    per_prompt: ClassVar[tuple[str, ...]]
    """Conditioning that depends on the prompt alone: a bank stores it once per prompt."""
    placed: ClassVar[tuple[str, ...] | None] = None
    """Conditioning with a row for each token, text first, which a window cuts with the states; None
    where patches cannot be windows.
    """
    surroundings: ClassVar[Surroundings | None] = None
    """How blocks are given what is around a window; None where they cannot be."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other classes that published configurations name; diffusers builds `transformer` for them."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Components of the pipeline, beside `NEEDED` and `tokenizer`, without which it does not work.
    """
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]]
    """Width in the transformer's configuration -> text encoders whose outputs, side by side, have
    it.
    """
    token_step: ClassVar[int] = 1
    """Rows and columns of tokens are a multiple of it."""
    packed: ClassVar[int] = 1
    """Channels of the transformer for each of the latents: 4 where 2 x 2 latents are a token."""
    switches: ClassVar[Rules]
    """Every key of the transformer's configuration, and which values are implemented."""
    vae_switches: ClassVar[Rules]
    """Keys of the autoencoder's configuration that the family or its pipeline reads."""
    samples_posterior: ClassVar[bool] = True
    """Whether `encode_image` samples the autoencoder's posterior, as stock training scripts do."""
    towards_picture: ClassVar[bool] = False
    """Whether the model's time runs from noise, 0, to picture, 1, and it predicts picture minus
    noise. Timesteps of schedulers grow with the noise, and what is learned is noise minus picture.
    """
    guided_by: ClassVar[str] = "guidance_scale"
    """Argument of the pipeline's call: its scale s of guidance away from a negative prompt; "" if
    the pipeline has none.
    """
    guided_from: ClassVar[int] = 1
    """Scale above which the pipeline guides. The guided prediction of p and the negative u is
    u + s (p - u) where it is 1, and p + s (p - u) where it is 0.
    """
    rescales: ClassVar[bool] = False
    """Whether the guided prediction gets the norm of the unguided one."""
    negative_prompt: ClassVar[str] = ""
    """That `sample` guides away from."""
    image: int = 0
    """Number of image tokens in the sequence of the block that ran last, where a block gets text
    and image as one sequence.
    """
    traced: bool = False
    """Whether `run_block` and `begin` are within `traceable`."""

    # ---------------------------------------------------------------- configuration

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformer's configuration, read from a pipeline folder, with every key.

        Keys that the file does not have get the class's default, as in diffusers.

        Raises:
            BadInput: it is missing, of another class, or says what is not implemented.
        """
        path = folder / "transformer" / "config.json"
        stored = read_config(path, self.transformer, *self.aliases)
        own = switches.defaults_of(self.transformer)
        known = dict(own)
        for name in self.aliases:
            known = {**switches.defaults_of(name), **known}
        switches.check(path, stored, self.switches, known)
        config = {**own, **stored}
        switches.check_fit(path, config, self.misfits(config))
        return config

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Keys of the transformer's configuration that contradict others.

        Args:
            config: with every key, each value of which `switches` accepts.
        """
        raise NotImplementedError

    def vae_config(self, folder: Path) -> dict[str, Any]:
        """The autoencoder's configuration, read from a pipeline folder, with every key.

        Raises:
            BadInput: it is missing, of another class, or says what is not implemented.
        """
        path = folder / "vae" / "config.json"
        stored = read_config(path, self.autoencoder)
        config = {**switches.defaults_of(self.autoencoder), **stored}
        read = {key: config.get(key) for key in self.vae_switches}
        switches.check(path, read, self.vae_switches, {})
        switches.check_fit(path, config, self.vae_misfits(config))
        return config

    def vae_misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Keys of the autoencoder's configuration that contradict others.

        Args:
            config: with every key; `vae_switches` accepts the values that are read.
        """
        yield from ()

    def grid_faults(
        self, config: Mapping[str, Any], sizes: Mapping[str, int], multiple: int
    ) -> list[BadInput]:
        """Sizes of pictures that the transformer has no positions for.

        Args:
            config: of the transformer.
            sizes: where each stands -> pixels.
            multiple: pixels per side of a token.
        """
        return []

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token: the autoencoder's downsampling factor times the patch size.

        Args:
            config: of the transformer.
            vae: configuration of the autoencoder.
        """
        return self.factor(vae) * config["patch_size"]

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per side of a latent, by the autoencoder's configuration."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def latents(self, vae: Any) -> Latents:
        """How the latents of an autoencoder and the transformer's differ.

        Args:
            vae: the autoencoder.
        """
        config = vae.config
        channels = config["latent_channels"]
        shifts = "shift_factor" in self.vae_switches
        return Latents(
            shift=[config["shift_factor"] if shifts else 0.0] * channels,
            scale=[config["scaling_factor"]] * channels,
            packed=self.packed > 1,
            factor=self.factor(config),
            samples=self.samples_posterior,
        )

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """What the scheduler's timestep is multiplied by, by the transformer's configuration."""
        return 1.0

    def block_names(self, config: Mapping[str, Any]) -> list[str]:
        """Names of the blocks within the model, in order of execution."""
        return [
            f"{container}.{number}"
            for container, key in self.containers.items()
            for number in range(config[key])
        ]

    def objective(self, scheduler: Mapping[str, Any]) -> Objective:
        """What the model is trained to predict, by the scheduler's configuration."""
        raise NotImplementedError

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Number of text tokens that fits all of ``prompts``.

        Raises:
            BadInput: a prompt is so long that the pipeline would cut it off.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- transformer

    @property
    def streams(self) -> tuple[str, ...]:
        """Arguments of a block that are the state, in the order in which it returns them."""
        return ("encoder_hidden_states", "hidden_states") if self.joint else ("hidden_states",)

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
        """Arguments of `forward`, as the pipeline's denoising loop passes them.

        Args:
            model: the transformer; only its configuration is read.
            latents: noised latents, shaped as `encode_image` shapes them.
            timestep: from `Objective.timestep`.
            prompt: from `encode_prompts`.
            grid: token rows and columns.
        """
        raise NotImplementedError

    def handed(self, timestep: Tensor) -> Tensor:
        """The stock forward's timestep of the scheduler's times `timestep_factor`, both [1]."""
        return 1 - timestep if self.towards_picture else timestep

    def forward(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The stock forward's output, shaped as latents.

        Args:
            model: the transformer.
            inputs: from `inputs`.
        """
        return model(**inputs, return_dict=False)[0]

    def image_tokens(self, model: Any, inputs: Mapping[str, Any]) -> int:
        """Number of image tokens.

        Args:
            model: the transformer; only its configuration is read.
            inputs: of the stock forward.
        """
        latents = inputs["hidden_states"]
        if latents.ndim == 3:
            return latents.shape[1]
        return latents.shape[-2] * latents.shape[-1] // model.config.patch_size**2

    def conditioning(self, call: Call) -> Conditioning:
        """Conditioning of a block by its names there; what only the head reads as "<name>.head"."""
        raise NotImplementedError

    def conditioning_of_blocks(self, calls: Mapping[str, Call]) -> Conditioning:
        """Conditioning of all blocks and the head, by full names.

        Args:
            calls: of all blocks by name, in order.
        """
        found: Conditioning = {}
        for block, call in calls.items():
            container = block.partition(".")[0]
            for name, value in self.conditioning(call).items():
                reader = ""
                if name in self.by_list + self.by_block:
                    reader = f".{container if name in self.by_list else block}"
                found.setdefault(name + reader, value)
        return found

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Arguments of a block besides the state, by the names that conditioning has there; the
        inverse of `conditioning`.
        """
        raise NotImplementedError

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The stock forward's output, computed from the last image tokens.

        Args:
            model: the transformer; only `head_modules` and ``config`` are read.
            image: tokens after the last block, [1, N, D].
            cond: conditioning, by full names.
            grid: token rows and columns.
        """
        raise NotImplementedError

    def learned(self, prediction: Tensor) -> Tensor:
        """The part of the model's output that is compared with the target."""
        return -prediction if self.towards_picture else prediction

    @torch.no_grad()
    def begin(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        """The state that enters the first block, and the conditioning of all blocks.

        Args:
            model: the transformer; its blocks do not run and may lie on the meta device.
            inputs: from `inputs`.
        """
        calls: dict[str, dict[str, Any]] = {}
        seen: list[Any] = []
        handle = None
        if self.watched:
            watched: Any = getattr(model, self.watched)
            handle = watched.register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            with self.prelude(model, inputs), self.without_blocks(model, calls):
                self.forward(model, inputs)
        finally:
            if handle is not None:
                handle.remove()
        for call in calls.values() if seen else ():
            call[self.watched] = seen[0]
        cond = self.conditioning_of_blocks({n: {**inputs, **call} for n, call in calls.items()})
        return self.entry(model, inputs, next(iter(calls.values())), cond), cond

    def prelude(self, model: Any, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """A context in which all that is before the first block can be traced for a prompt of any
        length.

        Args:
            model: the transformer.
            inputs: from `inputs`.
        """
        return nullcontext()

    def entry(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        call: Mapping[str, Any],
        cond: Mapping[str, Tensor],
    ) -> State:
        """The state that enters the first block.

        Args:
            model: the transformer; only its configuration is read.
            inputs: from `inputs`.
            call: the arguments of the first block.
            cond: conditioning.
        """
        text = call["encoder_hidden_states"] if self.joint else None
        return State(call["hidden_states"], text)

    @contextmanager
    def without_blocks(
        self, model: nn.Module, calls: dict[str, dict[str, Any]] | None = None
    ) -> Iterator[None]:
        """A context in which every block of the model changes nothing.

        Args:
            model: the transformer; its blocks may lie on the meta device.
            calls: gets the arguments of every block's last call, by the block's name.
        """
        kept = {name: getattr(model, name) for name in self.containers}
        told = {} if calls is None else calls
        told |= {name: {} for name in self.blocks(model)}
        for name, blocks in kept.items():
            # As many as there are blocks, because a forward may use a block's position.
            stand_ins = [
                _StandIn(block, self.streams, told[f"{name}.{number}"])
                for number, block in enumerate(blocks)
            ]
            setattr(model, name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            for name, blocks in kept.items():
                setattr(model, name, blocks)

    def run_block(
        self, name: str, block: nn.Module, state: State, cond: Mapping[str, Tensor], grid: Grid
    ) -> State:
        """The state after a block.

        Args:
            name: of the block in the model.
            block: itself.
            state: before it.
            cond: conditioning, by full names or by those that this block reads.
            grid: token rows and columns.
        """
        own = read_by(name, cond)
        arguments = self.arguments(own, grid)
        given: AbstractContextManager[None] = nullcontext()
        if self.surroundings and are_given(own):
            given = self.surroundings.given(block, own)
        with given:
            if not self.joint:
                return State(block(hidden_states=state.image, **arguments))
            text, image = block(
                hidden_states=state.image, encoder_hidden_states=state.text, **arguments
            )
            return State(image, text)

    def blank_surroundings(
        self, model: nn.Module, blocks: Iterable[str], side: int, whole: int
    ) -> Conditioning:
        """Zeros shaped as what blocks are given of what is around a window.

        Args:
            model: the transformer; its blocks may lie on the meta device.
            blocks: names of those that are given it.
            side: tokens of a window's side.
            whole: tokens of the picture's side.
        """
        if self.surroundings is None:
            raise TypeError(f"blocks of {self.name} cannot be given surroundings")
        return {
            f"{what}.{name}": value
            for name in blocks
            for what, value in self.surroundings.blank(
                model.get_submodule(name), side, whole
            ).items()
        }

    @contextmanager
    def traceable(self) -> Iterator[None]:
        """A context in which `run_block` uses only operations that every target has: positions
        rotate by real numbers.
        """
        before, self.traced = self.traced, True
        try:
            with RealRotations():
                yield
        finally:
            self.traced = before

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents and a prompt of the right shapes; their values mean nothing.

        Args:
            model: the transformer; only its configuration is read.
            grid: token rows and columns.
            text: number of text tokens.
        """
        raise NotImplementedError

    def by_prompt(self, windows: bool) -> tuple[str, ...]:
        """Conditioning that a bank stores once per prompt; positions differ from window to window.

        Args:
            windows: whether patches are windows.
        """
        placed = (self.placed or ()) if windows else ()
        return tuple(name for name in self.per_prompt if name not in placed)

    # ---------------------------------------------------------------- pipeline

    @torch.no_grad()
    def encode_image(
        self, vae: Any, pixels: Tensor, posterior: Normal, tile: int | None = None
    ) -> Tensor:
        """Clean latents, scaled (and packed) as the transformer takes them.

        Args:
            vae: the autoencoder.
            pixels: [1, 3, H, W] float32 in [-1, 1]; sides are multiples of `multiple`.
            posterior: gives standard normal numbers of a shape, in families that sample the
                autoencoder's posterior.
            tile: side in pixels of the tiles that go through the autoencoder one by one; None for
                the whole picture.
        """

        def run(part: np.ndarray) -> list[np.ndarray]:
            made = self.moments(vae, torch.from_numpy(part))
            return [value.numpy() for value in made if value is not None]

        if tile is None:
            raw, deviation = self.moments(vae, pixels)
        else:
            factor = self.latents(vae).factor
            made = tiled(pixels.numpy(), run, tile, factor, (1, factor))
            raw, deviation, *_ = [*map(torch.from_numpy, made), None]
        return self.clean(vae, raw, deviation, posterior)

    def clean(self, vae: Any, mean: Tensor, deviation: Tensor | None, posterior: Normal) -> Tensor:
        """Clean latents, as `encode_image` gives them, of a picture's `moments`.

        Args:
            vae: the autoencoder; only its configuration is read.
            mean, deviation: from `moments`.
            posterior: as `encode_image` takes it.
        """
        raw = mean if deviation is None else mean + deviation * posterior(tuple(mean.shape))
        return torch.from_numpy(self.latents(vae).scaled(raw.numpy()))

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean [1, C, h, w] of a picture's latents, before shift and scale, and their deviation, in
        families that sample the autoencoder's posterior.

        Args:
            vae: the autoencoder.
            pixels: as `encode_image` takes them.
        """
        found = vae.encode(pixels).latent_dist
        return found.mean, found.std

    def pixels(self, vae: Any, raw: Tensor) -> Tensor:
        """The picture [1, 3, H, W] of the autoencoder's latents [1, C, h, w]."""
        return vae.decode(raw, return_dict=False)[0]

    def pipeline_latents(self, latents: Tensor, rows: int) -> Tensor:
        """The transformer's latents of pictures as the pipeline's call takes them.

        Args:
            latents: noise, shaped as `encode_image` shapes latents.
            rows: of tokens.
        """
        return latents

    def guides(self, pipeline: Any) -> bool:
        """Whether the pipeline can guide away from a negative prompt."""
        return bool(self.guided_by)

    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Each prompt as the pipeline encodes it for sampling.

        Args:
            pipeline: only the configuration of its transformer is read.
            prompts: texts.
            tokens: length of the encoded text, from `text_tokens`.

        Raises:
            BadInput: a prompt has more tokens.
        """
        raise NotImplementedError

    def as_arguments(self, prompt: Prompt) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for a prompt; of a negative one they have
        "negative_" before them.

        Args:
            prompt: from `encode_prompts`.
        """
        return {
            # some pipelines count a mask's ones
            PIPELINE_ARGUMENTS[k]: v.to(torch.int64) if k.endswith("mask") else v
            for k, v in prompt.items()
        }

    def encode_negatives(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Each prompt as the pipeline encodes a negative one; arguments as of `encode_prompts`."""
        return self.encode_prompts(pipeline, prompts, tokens)

    def cannot_paint(self, pipeline: Any) -> str:
        """Why the pipeline's steps cannot be told by its scheduler alone; "" if they can."""
        return ""

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """Arguments of the pipeline's call besides prompts, size and generators.

        Args:
            pipeline: that is called.
            pictures: number of pictures in the call.
        """
        raise NotImplementedError

    def sample(self, pipeline: Any, prompt: str, side: int, seeds: list[int]) -> list[Any]:
        """Square pictures (PIL) of a prompt by the stock pipeline, one per seed.

        Args:
            pipeline: that draws.
            prompt: text.
            side: of a picture, in pixels.
            seeds: of the noise it starts from, by `edge_dit.contract.noise`.
        """
        latents = self.latents(pipeline.vae)
        shape = latents.shape(side // latents.factor)
        noise = [torch.from_numpy(normal(seed, NOISE, shape)) for seed in seeds]
        rows = side // self.multiple(pipeline.transformer.config, pipeline.vae.config)
        return pipeline(
            prompt=[prompt] * len(seeds),
            height=side,
            width=side,
            latents=self.pipeline_latents(torch.cat(noise), rows),
            # of steps that are random themselves
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self.sample_options(pipeline, len(seeds)),
        ).images


def read_config(path: Path, expected: str, *aliases: str) -> dict[str, Any]:
    """The configuration of a part of a pipeline.

    Args:
        path: of its config.json.
        expected: class it must name.
        aliases: other names of that class.

    Raises:
        BadInput: unreadable, or of another class.
    """
    config = read_json(path, f"the configuration of {expected}")
    named = config.get("_class_name")
    if named not in (expected, *aliases):
        raise BadInput(path, found=f"class {named!r:.80}", expected=expected, remedy=INCOMPLETE)
    return config


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration of a pipeline folder.

    Raises:
        BadInput: missing or unreadable.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    return read_json(path, "a scheduler's configuration")


def tokenizer_of(folder: Path, part: str = "tokenizer") -> Any:
    """A tokenizer of a pipeline folder.

    Raises:
        BadInput: it cannot be loaded.
    """
    check_vocabulary(folder / part)
    with quiet():
        from transformers import AutoTokenizer

        with refusing(folder / part, "transformers cannot load it", "a tokenizer"):
            return AutoTokenizer.from_pretrained(
                folder / part, local_files_only=True, trust_remote_code=False
            )


def longest(lengths: Mapping[str, int], limit: int) -> int:
    """The largest token count of prompts.

    Args:
        lengths: tokens of each prompt.
        limit: most tokens that the pipeline takes.

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
    """A masked prompt cut to ``tokens``; only padding is removed.

    Args:
        prompt: encoded, with padding.
        name: of the embeddings, [1, L, D].
        mask: name of the mask [1, L], 1 for a token and 0 for padding.
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


# ---------------------------------------------------------------- shared by several families


CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
"""Block arguments of SANA and PixArt that are conditioning under the same name."""


def modulated_conditioning(call: Mapping[str, Any], embedder: str) -> Conditioning:
    """Conditioning of families with text in cross-attention and an embedded timestep in the head.

    Args:
        call: as `Family.conditioning` gets it.
        embedder: name of the submodule that returns (modulation, embedded timestep).
    """
    named = {name: call[name] for name in CROSS_ATTENTION}
    return {**named, "embedded_timestep": call[embedder][1]}


def masked_prompt(embeds: Tensor, mask: Tensor, tokens: int) -> Prompt:
    """A prompt of families with text in cross-attention, cut to ``tokens``.

    Args:
        embeds: [1, L, D].
        mask: [1, L], 1 for a token and 0 for padding.
        tokens: length to cut to.

    Raises:
        BadInput: the prompt has more tokens.
    """
    prompt = {"encoder_hidden_states": embeds.float(), "encoder_attention_mask": mask.float()}
    return cut(prompt, "encoder_hidden_states", "encoder_attention_mask", tokens)


def blank_caption(width: int, text: int) -> Prompt:
    """A `masked_prompt` of ``text`` tokens of ``width`` features, zeros without padding."""
    return {
        "encoder_hidden_states": torch.zeros(1, text, width),
        "encoder_attention_mask": torch.ones(1, text),
    }


def pooled_prompt(embeds: Tensor, pooled: Tensor) -> Prompt:
    """A prompt of families with pooled text: [1, L, D] and [1, P]."""
    return {"encoder_hidden_states": embeds.float(), "pooled_projections": pooled.float()}


def blank_pooled(config: Any, text: int) -> Prompt:
    """A `pooled_prompt` of ``text`` tokens, zeros."""
    return pooled_prompt(
        torch.zeros(1, text, config.joint_attention_dim),
        torch.zeros(1, config.pooled_projection_dim),
    )


def blank_latents(config: Any, grid: Grid) -> Tensor:
    """Latents [1, C, rows patch, columns patch] of families that do not pack them, zeros."""
    rows, columns = (side * config.patch_size for side in grid)
    return torch.zeros(1, config.in_channels, rows, columns)


def patchify(image: Tensor, patch: int) -> Tensor:
    """The inverse of `unpatchify`."""
    _, channels, height, width = image.shape
    image = image.reshape(1, channels, height // patch, patch, width // patch, patch)
    return image.permute(0, 2, 4, 3, 5, 1).reshape(1, -1, patch * patch * channels)


def unpatchify(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """Tokens [1, N, patch^2 C] to an image [1, C, rows patch, columns patch]."""
    rows, columns = grid
    tokens = tokens.reshape(1, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return tokens.reshape(1, -1, rows * patch, columns * patch)
