"""The dynamic patch sampler as a torch module; host and exported bundles use the same one.

It equals ``interpolate(crop, size=s_min, mode="bilinear", antialias=True)``. Crop and resize are
two small interpolation matrices around the image, so the exported graph has no shape that depends
on data and no Resize operator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_dit.pictures.crop import CropRule


class PatchSampler(nn.Module):
    """Cut the crop of `CropRule.crop` out of an image and resize it to s_min.

    Args:
        rule: of the crops.
    """

    def __init__(self, rule: CropRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, image: Tensor, sigma: Tensor, uv: Tensor) -> Tensor:
        """One patch.

        Args:
            image: [1, 3, H, W] float32, both sides at least s_max.
            sigma: noise level in [0, 1], [1] float32.
            uv: horizontal and vertical position in [0, 1], [2] float32.

        Returns:
            [1, 3, s_min, s_min] float32.
        """
        side = self.rule.s_min + sigma * (self.rule.s_max - self.rule.s_min)
        side = torch.round(side / self.rule.multiple) * self.rule.multiple
        rows = self._matrix(image.shape[2], side, uv[1:2])
        columns = self._matrix(image.shape[3], side, uv[0:1])
        return rows @ image @ columns.transpose(0, 1)

    def _matrix(self, size: int, side: Tensor, position: Tensor) -> Tensor:
        """Interpolation weights [s_min, size] of one axis.

        Each row is a triangle of half-width max(1, side / s_min) around the centre of an output
        pixel, zero outside the crop, normalised to sum 1.
        """
        free = size - side
        start = torch.minimum(torch.floor(position * (free + 1)), free)
        pixel = torch.arange(size, dtype=torch.float32).unsqueeze(0)
        output = torch.arange(self.rule.s_min, dtype=torch.float32).unsqueeze(1)
        scale = side / self.rule.s_min
        centre = start + (output + 0.5) * scale
        distance = (pixel + 0.5 - centre).abs() / scale.clamp(min=1.0)
        inside = ((pixel >= start) & (pixel < start + side)).to(torch.float32)
        weights = (1.0 - distance).clamp(min=0.0) * inside
        return weights / weights.sum(dim=1, keepdim=True)
