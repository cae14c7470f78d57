"""Torchvision's policies of augmentation: RandAugment, TrivialAugment, AugMix and AutoAugment."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cvdist.config import AutoAugment


def apply(name: AutoAugment, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Augment each picture separately, with random numbers from a seed of its own.

    Args:
        name: the policy, but not `none`.
        images: float (n, 1 or 3, H, W), from 0 to 255.
        seeds: one for each picture.

    Returns:
        float, whole numbers, of the same shape.
    """
    pixels, policy = images.round().clamp(0, 255).to(torch.uint8), _policy(name)
    with _restored() as random:
        for picture, seed in zip(pixels, seeds, strict=True):
            random.manual_seed(seed)
            picture.copy_(policy(picture))
    return pixels.float()


@contextmanager
def _restored() -> Iterator[torch.Generator]:
    """Provide the CPU's generator for the policies to draw from, and restore its state for dropout."""
    random = torch.default_generator
    state = random.get_state()
    try:
        yield random
    finally:
        random.set_state(state)


@functools.cache
def _policy(name: AutoAugment) -> torch.nn.Module:
    """Build the policy with the values of torchvision's reference script."""
    from torchvision.transforms import v2  # takes long to import

    class AugMix(v2.AugMix):
        """AugMix that draws its weights on the CPU, as everything else is drawn."""

        def _sample_dirichlet(self, params: Tensor) -> Tensor:
            return super()._sample_dirichlet(params.cpu()).to(params.device)

    kinds = {
        "ra": v2.RandAugment,
        "ta_wide": v2.TrivialAugmentWide,
        "augmix": AugMix,
        "imagenet": v2.AutoAugment,
    }
    made: torch.nn.Module = kinds[name](interpolation=v2.InterpolationMode.BILINEAR)
    return made
