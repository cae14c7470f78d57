"""Pictures are prepared as the transforms of torchvision's weights prepare them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import get_model_weights

from cvdist import config as configs
from cvdist import models, recipes
from cvdist.config import ModelConfig
from cvdist.data.images.resizing import crop_middle


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin_v2_t", "efficientnet_b0", "regnet_y_400mf"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (601, 200), (256, 256), (90, 91)])
def test_pixels_are_those_of_the_weights_own_transforms(name, height, width):
    # Smooth, because interpolation of noise overshoots, and is clipped at another moment.
    blots = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0)) * 255
    pixels = F.interpolate(blots, (height, width), mode="bilinear")[0].to(torch.uint8)
    needs = models.preprocessing(ModelConfig(name=name, weights="DEFAULT", head="linear"))
    mine = crop_middle(pixels, needs.size, needs.resize, (height, width)) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (needs.mean, needs.std))
    theirs = get_model_weights(name).DEFAULT.transforms()(pixels)
    # Both round to whole pixel values, one of them from numbers of 8 bits and the other from floats.
    torch.testing.assert_close(mine, theirs * std + mean, rtol=0, atol=1.01 / 255)
    assert (mine - theirs * std - mean).abs().mean() < 0.25 / 255


def test_settings_that_are_left_to_the_weights():
    chosen = recipes.find("transfer", model="swin_v2_t")
    assert (chosen.data.image_size, chosen.data.resize) == (0, "weights")
    data = models.with_preprocessing(chosen).data
    assert (data.image_size, data.resize) == (256, "crop:260:bicubic")
    # Another size shows the same part of a picture.
    data = models.with_preprocessing(configs.replace(chosen, image_size=128)).data
    assert (data.image_size, data.resize) == (128, "crop:130:bicubic")
    book = recipes.find("dogs-cats-vgg16")
    assert models.with_preprocessing(book) is book
