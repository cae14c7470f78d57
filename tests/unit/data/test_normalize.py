"""Normalization: the same numbers whatever the memory format of the pictures."""

from __future__ import annotations

import pytest
import torch

from cvdist.data.normalize import Normalizer


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_memory_formats_give_the_same_numbers_in_place(channels, channels_last):
    mean, std = [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]
    normalize = Normalizer(mean, std, torch.device("cpu"), channels_last=channels_last)
    pixels = torch.randint(0, 256, (2, 5, 7, channels), generator=torch.Generator().manual_seed(0))
    by_rows = pixels.permute(0, 3, 1, 2).float()  # as they are decoded
    by_channels = by_rows.clone(memory_format=torch.contiguous_format)
    one, other = normalize(by_rows), normalize(by_channels)
    assert torch.equal(one, other) and torch.equal(by_rows, one) and torch.equal(by_channels, one)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert one.is_contiguous(memory_format=layout)
    for channel in range(channels):
        expected = (pixels[..., channel] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(one[:, channel], expected, rtol=1e-5, atol=1e-6)
