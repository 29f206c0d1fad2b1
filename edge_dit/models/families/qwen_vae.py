"""Families whose autoencoder is Qwen-Image's: to it a picture is a film of one frame, and every
channel of its latents has a mean and a deviation of its own. A token is 2 x 2 latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from edge_dit.contract.loop import Latents
from edge_dit.models.families.family import Family
from edge_dit.models.families.switches import (
    Misfits,
    Rules,
    finite,
    flag,
    one_of,
    positive,
    several,
    whole,
)


class QwenVae(Family):
    """A family with AutoencoderKLQwenImage."""

    autoencoder = "AutoencoderKLQwenImage"
    packed = 4
    vae_switches: ClassVar[Rules] = {
        "input_channels": one_of(3, why="pictures have red, green and blue"),
        "z_dim": whole(),
        "dim_mult": several(whole(), least=1),
        "temperal_downsample": several(flag()),
        "latents_mean": several(finite(), least=1),
        "latents_std": several(positive(), least=1),
    }

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per side of a latent."""
        return 2 ** len(vae["temperal_downsample"])

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token; the pipeline packs 2 x 2 latents into one."""
        return self.factor(vae) * 2

    def latents(self, vae: Any) -> Latents:
        """Every channel by its own mean and deviation."""
        return Latents(
            shift=list(vae.config["latents_mean"]),
            scale=[1 / deviation for deviation in vae.config["latents_std"]],
            packed=self.packed > 1,
            factor=self.factor(vae.config),
            samples=self.samples_posterior,
        )

    def vae_misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Lists of other lengths than the autoencoder has stages and channels."""
        if len(config["temperal_downsample"]) != len(config["dim_mult"]) - 1:
            yield (
                "temperal_downsample",
                f"{len(config['dim_mult']) - 1} values, one less than dim_mult",
            )
        for key in ("latents_mean", "latents_std"):
            if len(config[key]) != config["z_dim"]:
                yield key, f"{config['z_dim']} values, the z_dim"

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation [1, C, h, w]; to the autoencoder an image is a film of one frame."""
        found = vae.encode(pixels.unsqueeze(2)).latent_dist
        return found.mean.squeeze(2), found.std.squeeze(2)

    def pixels(self, vae: Any, raw: Tensor) -> Tensor:
        """The picture [1, 3, H, W], the only frame of a film."""
        return vae.decode(raw.unsqueeze(2), return_dict=False)[0].squeeze(2)
