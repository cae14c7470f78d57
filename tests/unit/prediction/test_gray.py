"""Gray pictures for models that take one channel."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from cvdist.prediction.predict import to_gray


def test_gray_is_pillows_gray():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    ours = to_gray(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0, 0].numpy()
    theirs = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    assert np.abs(ours - theirs).max() <= 1 and (ours == theirs).mean() > 0.99
