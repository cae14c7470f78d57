"""Augmentation of whole batches on the training device.

The random numbers that augment a picture depend only on the seed, the epoch and the picture's position in the
epoch's order. They do not depend on the number of workers or on where a run was interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvdist.config import PicturesConfig
from cvdist.data.sampler import LocalBatch
from cvdist.seeding import generator

_PLACE = 4  # flip, angle, shift in x, shift in y
_CROP = 4  # area, proportions, place in x, place in y
_COLOR = 3  # brightness, contrast, saturation
_PROPORTIONS = 4 / 3  # of a crop's sides, at most
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def luma(images: Tensor) -> Tensor:
    """Return the brightness (n, 1, H, W) of RGB pictures (n, 3, H, W), as ITU-R BT.601 defines it."""
    return (images * torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


@dataclass(frozen=True)
class Augmentation:
    """Random horizontal flips, rotations, translations, crops and color jitter.

    Attributes:
        horizontal_flip: probability in [0, 1] of mirroring a picture.
        rotation: largest angle in degrees, to either side.
        translation: largest shift to either side, as a fraction of width and height. What moves into the
            picture is black.
        seed: seed of the random numbers.
        smallest_crop: smallest fraction in (0, 1] of the area that a crop keeps (Szegedy et al. 2015,
            arXiv:1409.4842); 1 turns cropping off.
        color_jitter: in [0, 1]. Brightness, contrast and saturation are each multiplied by a random factor
            between 1 minus and 1 plus this value.
    """

    horizontal_flip: float
    rotation: float
    translation: float
    seed: int
    smallest_crop: float = 1.0
    color_jitter: float = 0.0

    @classmethod
    def from_config(cls, config: PicturesConfig, seed: int) -> Augmentation | None:
        """Build the configured augmentation, or return None if all of it is turned off."""
        chosen = cls(
            config.horizontal_flip,
            config.rotation,
            config.translation,
            seed,
            config.random_resized_crop,
            config.color_jitter,
        )
        return None if chosen == cls(0.0, 0.0, 0.0, seed) else chosen

    def draw(self, local: LocalBatch, epoch: int) -> Tensor:
        """Uniform numbers in [0, 1) for the pictures of a local batch, float32 (n, 11), on the CPU."""
        # Drawn for the whole global batch and cut, so that the draws do not depend on the number of workers;
        # each kind from its own stream, so that one more kind leaves the others as they are.
        kinds = {"augment": _PLACE, "crop": _CROP, "color": _COLOR}
        draws = [
            torch.rand(local.global_size, count, generator=generator(kind, self.seed, epoch, local.start))
            for kind, count in kinds.items()
        ]
        return torch.cat(draws, dim=1)[local.offset : local.offset + len(local.indices)]

    def draw_view(self, digest: str, view: int) -> Tensor:
        """Draw the random numbers for one stored view of a picture, float32 (11,) on the CPU.

        They depend only on the seed, the picture's content and the number of the view.
        """
        return torch.rand(_PLACE + _CROP + _COLOR, generator=generator("view", self.seed, digest, view))

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: float (n, C, H, W), from 0 (black) to 255 (white). May be overwritten.
            draws: random numbers from `draw` or `draw_view`, float32 (n, 11) on the same device.
        """
        place, crop, color = draws.split([_PLACE, _CROP, _COLOR], dim=1)
        if self.rotation or self.translation or self.smallest_crop < 1:
            images = self._move(images, place, crop)
        elif self.horizontal_flip:
            mirrored = place[:, 0] < self.horizontal_flip
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return self._recolor(images, color) if self.color_jitter else images

    def _move(self, images: Tensor, place: Tensor, crop: Tensor) -> Tensor:
        # One resampling does it all: each output pixel looks up its source by the inverse transform, in
        # coordinates from -1 to 1, where a non-square picture needs its aspect ratio put back.
        flip, angle, dx, dy = place.unbind(1)
        radians = (2 * angle - 1) * math.radians(self.rotation)
        cos, sin = radians.cos(), radians.sin()
        sign = torch.where(flip < self.horizontal_flip, -1.0, 1.0)
        aspect = images.shape[-2] / images.shape[-1]
        width, height, left, top = self._crops(crop)
        shift_x = (2 * dx - 1) * 2 * self.translation + left
        shift_y = (2 * dy - 1) * 2 * self.translation + top
        theta = torch.stack(
            [
                torch.stack([width * sign * cos, -height * sin * aspect, shift_x], dim=1),
                torch.stack([width * sign * sin / aspect, height * cos, shift_y], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _crops(self, crop: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Width and height of each crop as shares of the picture's, and its middle, from -1 to 1."""
        area, proportions, x, y = crop.unbind(1)
        kept = self.smallest_crop + (1 - self.smallest_crop) * area
        side = kept.sqrt()
        # Where the area leaves no room for the proportions drawn, the crop is as long as the picture.
        stretch = torch.exp((2 * proportions - 1) * math.log(_PROPORTIONS) / 2).clamp(side, 1 / side)
        width, height = side * stretch, side / stretch
        return width, height, (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)

    def _recolor(self, images: Tensor, color: Tensor) -> Tensor:
        brightness, contrast, saturation = (1 + (2 * color - 1) * self.color_jitter).T[..., None, None, None]
        images = (images * brightness).clamp(0, 255)
        gray = luma(images) if images.shape[1] == 3 else images
        middle = gray.mean((2, 3), keepdim=True)
        images = (middle + contrast * (images - middle)).clamp(0, 255)
        if images.shape[1] != 3:
            return images
        gray = luma(images)
        return (gray + saturation * (images - gray)).clamp(0, 255)
