"""The last step of every batch, the same for all data sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normaliser:
    """(pixel / 255 - mean) / std by channel, in the layout that the model is fastest with."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, *, channels_last: bool
    ) -> None:
        """Of pictures on `device`; mean and deviation by channel, for pixels in [0, 1]."""
        shape = (1, len(mean), 1, 1)
        deviation = torch.tensor(std, device=device).view(shape)
        # As one multiplication and one addition.
        self._scale = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, device=device).view(shape) / deviation
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Float pixels (n, C, H, W) from 0 to 255, which are overwritten."""
        return images.mul_(self._scale).add_(self._shift).contiguous(memory_format=self._layout)
