"""Augmentation of whole batches on the training device.

The random numbers that augment a picture depend only on the seed, the epoch and the picture's position in the
epoch's order. They do not depend on the number of workers or on where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvdist.config import AugmentationConfig, part_of
from cvdist.data import policies
from cvdist.data.dataset import to_device
from cvdist.data.sampler import LocalBatch
from cvdist.seeding import generator

_PLACE = 4  # flip, angle, shift in x, shift in y
_CROP = 4  # area, proportions, place in x, place in y
_COLOR = 3  # brightness, contrast, saturation
_ERASE = 5  # whether, area, proportions, place in y, place in x
_AUTO = 1  # the seed of what torchvision draws
_AUTO_SEEDS = 1 << 24  # as many as float32 tells apart in [0, 1)
_ERASED_AREA = (0.02, 0.33)  # as a share of the picture's (Zhong et al. 2017, arXiv:1708.04896)
_ERASED_PROPORTIONS = (0.3, 3.3)  # height by width
_PART_BYTES = 4 << 20  # of pictures that a CPU augments at once: in its cache, twice as fast as a large batch
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def luma(images: Tensor) -> Tensor:
    """Return the brightness (n, 1, H, W) of RGB pictures (n, 3, H, W), as ITU-R BT.601 defines it."""
    return (images * torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


@dataclass(frozen=True)
class Augmentation(AugmentationConfig):
    """Random flips, rotations, translations, crops, colors and erased rectangles, and torchvision's policies.

    Attributes:
        seed: seed of the random numbers.
    """

    seed: int = 0

    @classmethod
    def from_config(cls, config: AugmentationConfig, seed: int) -> Augmentation | None:
        """Build the configured augmentation, or return None if all of it is turned off."""
        chosen = part_of(AugmentationConfig, config)
        return None if chosen == AugmentationConfig() else cls(**vars(chosen), seed=seed)

    def draw(self, local: LocalBatch, epoch: int) -> Tensor:
        """Draw uniform numbers in [0, 1) for the pictures of a local batch, float32 (n, 17), on the CPU."""
        # Drawn for the whole global batch, so that the draws do not depend on the number of workers;
        # each kind from its own stream, so that one more kind leaves the others as they are.
        kinds = {"augment": _PLACE, "crop": _CROP, "color": _COLOR, "erase": _ERASE, "auto": _AUTO}
        draws = [
            torch.rand(local.global_size, count, generator=generator(kind, self.seed, epoch, local.start))
            for kind, count in kinds.items()
        ]
        return torch.cat(draws, dim=1)[local.places]

    def draw_view(self, digest: str, view: int) -> Tensor:
        """Draw the random numbers for one stored view of a picture, float32 (17,) on the CPU.

        They depend only on the seed, the picture's content and the number of the view.
        """
        count = _PLACE + _CROP + _COLOR + _ERASE + _AUTO
        return torch.rand(count, generator=generator("view", self.seed, digest, view))

    def apply(self, images: Tensor, draws: Tensor, mean: Sequence[float] = (0.0,)) -> Tensor:
        """Augment a batch.

        Args:
            images: float (n, C, H, W), from 0 (black) to 255 (white). May be overwritten.
            draws: random numbers from `draw` or `draw_view`, float32 (n, 17), on the CPU.
            mean: color of what is erased, for pixels in [0, 1]: the mean, which is 0 after normalization.
        """
        if images.device.type != "cpu" or images.nbytes <= _PART_BYTES:
            return self._apply(images, draws, mean)
        size = max(1, len(images) * _PART_BYTES // images.nbytes)
        for part, part_draws in zip(images.split(size), draws.split(size), strict=True):
            part.copy_(self._apply(part, part_draws, mean))
        return images

    def _apply(self, images: Tensor, draws: Tensor, mean: Sequence[float]) -> Tensor:
        kinds = to_device(draws, images.device).split([_PLACE, _CROP, _COLOR, _ERASE, _AUTO], dim=1)
        place, crop, color, erase, _ = kinds
        if self.rotation or self.translation or self.random_resized_crop < 1:
            images = self._move(images, place, crop)
        elif self.horizontal_flip:
            mirrored = place[:, 0] < self.horizontal_flip
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.color_jitter:
            images = self._recolor(images, color)
        if self.auto_augment != "none":
            images = policies.apply(self.auto_augment, images, (draws[:, -1] * _AUTO_SEEDS).long().tolist())
        return self._erase(images, erase, mean) if self.random_erase else images

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
        """Return each crop's width and height as shares of the picture's, and its middle, from -1 to 1.

        The crops are those of Szegedy et al. 2015 (arXiv:1409.4842), with all proportions up to `crop_ratio`.
        """
        area, proportions, x, y = crop.unbind(1)
        kept = self.random_resized_crop + (1 - self.random_resized_crop) * area
        side = kept.sqrt()
        # Where the area leaves no room for the proportions drawn, the crop is as long as the picture.
        stretch = torch.exp((2 * proportions - 1) * math.log(self.crop_ratio) / 2).clamp(side, 1 / side)
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

    def _erase(self, images: Tensor, erase: Tensor, mean: Sequence[float]) -> Tensor:
        chosen, area, proportions, y, x = erase.unbind(1)
        height, width = images.shape[-2:]
        (small, large), (flat, tall) = _ERASED_AREA, map(math.log, _ERASED_PROPORTIONS)
        area = (small + (large - small) * area) * height * width
        ratio = (flat + (tall - flat) * proportions).exp()
        rows = _span((area * ratio).sqrt(), y, height)
        columns = _span((area / ratio).sqrt(), x, width)
        erased = rows[:, :, None] & columns[:, None, :] & (chosen < self.random_erase)[:, None, None]
        color = 255 * torch.tensor(mean, device=images.device).view(-1, 1, 1)
        return torch.where(erased[:, None], color, images)


def _span(length: Tensor, place: Tensor, size: int) -> Tensor:
    """Return which of `size` positions lie in a stretch, bool (n, size). At least one lies outside.

    Args:
        length: length of the stretch in positions, float (n,).
        place: where the stretch lies, from 0 (at the beginning) to 1 (at the end), float (n,).
        size: number of positions.
    """
    length = length.round().clamp(max=size - 1)
    first = torch.minimum((place * (size - length + 1)).floor(), size - length)
    positions = torch.arange(size, device=length.device)
    return (positions >= first[:, None]) & (positions < (first + length)[:, None])
