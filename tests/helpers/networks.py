"""VGGs with the book's classifier, without values or with a small classifier."""

from __future__ import annotations

import torch
from torch import nn

from cvdist import models
from cvdist.config import ModelConfig
from cvdist.models import InputSpec
from cvdist.models.transfer import give_values

PHOTOS = InputSpec(channels=3, height=224, width=224)
ALL = [f"vgg{layers}{suffix}" for layers in (11, 13, 16, 19) for suffix in ("", "_bn")]


def without_memory(name, trainable_stages=0, num_classes=2, **changes):
    """The model on the meta device, shapes without values: a VGG has more than 119 million weights."""
    settings = ModelConfig(**{"name": name, "trainable_stages": trainable_stages, "head": "vgg", **changes})
    return models.skeleton(settings, num_classes, PHOTOS)


def small(name="vgg11", trainable_stages=0):
    """Random convolutions of the real sizes under a classifier of 200 thousand weights, not 119 million."""
    torch.manual_seed(0)
    model = without_memory(name, trainable_stages, hidden_size=8)
    give_values(model)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    frozen = models.frozen_and_trained(model).frozen
    if frozen is not None:
        frozen.requires_grad_(False)
    return model
