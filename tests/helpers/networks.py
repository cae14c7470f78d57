"""VGGs without values."""

from __future__ import annotations

import torch
import torchvision

from cvdist.models import InputSpec
from cvdist.models.vgg import TransferVGG

PHOTOS = InputSpec(channels=3, height=224, width=224)
ALL = [f"vgg{layers}{suffix}" for layers in (11, 13, 16, 19) for suffix in ("", "_bn")]


def without_memory(name, trainable_blocks=0, num_classes=2):
    """The model on the meta device, shapes without values: a VGG has more than 119 million weights."""
    with torch.device("meta"):
        return TransferVGG(torchvision.models.get_model(name, num_classes=num_classes), trainable_blocks)
