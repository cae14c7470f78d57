"""The last step of every batch, the same for all data sets."""

from __future__ import annotations

import torch
from torch import Tensor

from cvdist.data.dataset import DatasetInfo


class Normaliser:
    """(pixel / 255 - mean) / std by channel, in the layout that the model is fastest with."""

    def __init__(self, info: DatasetInfo, device: torch.device, *, channels_last: bool) -> None:
        """Of pictures on `device`."""
        shape = (1, info.channels, 1, 1)
        std = torch.tensor(info.std, device=device).view(shape)
        # As one multiplication and one addition.
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(info.mean, device=device).view(shape) / std
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Float pixels (n, C, H, W) from 0 to 255, which are overwritten."""
        return images.mul_(self._scale).add_(self._shift).contiguous(memory_format=self._layout)
