"""Augmentation of whole batches, on the device that trains.

The random draws of a picture depend on (seed, epoch, its place in the epoch's order) and on nothing else: not
on the number of workers, nor on where a run was interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvdist.config import DataConfig
from cvdist.data.sampler import Share
from cvdist.seeding import generator

_DRAWS = 4  # flip, angle, shift in x, shift in y


@dataclass(frozen=True)
class Augmentation:
    """Mirroring and a small affine transform.

    horizontal_flip: probability in [0, 1]; rotation: degrees to either side; translation: fraction of width
    and height to either side. What moves into the picture is black.
    """

    horizontal_flip: float
    rotation: float
    translation: float
    seed: int

    @classmethod
    def from_config(cls, config: DataConfig, seed: int) -> Augmentation | None:
        """None where the configuration asks for no augmentation."""
        if not (config.horizontal_flip or config.rotation or config.translation):
            return None
        return cls(config.horizontal_flip, config.rotation, config.translation, seed)

    def draw(self, share: Share, epoch: int) -> Tensor:
        """Uniform numbers in [0, 1) for the pictures of a share, float32 (n, 4), on the CPU."""
        # Drawn for the whole global batch and cut, so that the draws do not depend on the number of workers.
        draws = torch.rand(
            share.global_size, _DRAWS, generator=generator("augment", self.seed, epoch, share.start)
        )
        return draws[share.offset : share.offset + len(share.indices)]

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Transform float pixels (n, C, H, W), black = 0, by draws (n, 4) on the same device."""
        flip, angle, dx, dy = draws.unbind(1)
        mirrored = flip < self.horizontal_flip
        if not (self.rotation or self.translation):
            return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        # One resampling does all three: each output pixel looks up its source by the inverse transform, in
        # coordinates from -1 to 1, where a non-square picture needs its aspect ratio put back.
        radians = (2 * angle - 1) * math.radians(self.rotation)
        cos, sin = radians.cos(), radians.sin()
        sign = torch.where(mirrored, -1.0, 1.0)
        aspect = images.shape[-2] / images.shape[-1]
        shift_x = (2 * dx - 1) * 2 * self.translation
        shift_y = (2 * dy - 1) * 2 * self.translation
        theta = torch.stack(
            [
                torch.stack([sign * cos, -sin * aspect, shift_x], dim=1),
                torch.stack([sign * sin / aspect, cos, shift_y], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
