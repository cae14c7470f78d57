"""The trained heads on top of VGG's convolutions: VGG's own classifier, a small MLP, or a linear probe.

A head consists of a pooling layer and a `classifier`, an `nn.Sequential` of `Linear`, `ReLU` and `Dropout`
layers. The classifier's first two linear layers can be split over workers, by columns and by rows. All heads
take the same features, so one cache serves them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from cvdist.config import Head, HeadSize, ModelConfig

CHANNELS, SIDE = 512, 7  # of what all of VGG's sizes make of a picture of 224x224 pixels
# By number of inputs and of hidden layers.
_STRUCTURES: dict[tuple[int, int], Head] = {
    (CHANNELS * SIDE * SIDE, 2): "vgg",
    (CHANNELS, 1): "mlp",
    (CHANNELS * SIDE * SIDE, 0): "linear",
}


def build(settings: ModelConfig, num_classes: int) -> tuple[nn.Module, nn.Sequential]:
    """Build the head that `settings` name, with PyTorch's default random weights, on the default device.

    Returns:
        The pooling, (n, 512, H, W) to (n, 512, h, w), and the classifier, (n, 512 * h * w) to (n, num_classes).
    """
    size = settings.head_size
    if size.name == "vgg":
        return vgg(num_classes, size.hidden_size, settings.dropout)
    if size.name == "mlp":
        return mlp(num_classes, size.hidden_size, settings.dropout)
    return linear(num_classes)


def vgg(num_classes: int, hidden: int, dropout: float) -> tuple[nn.Module, nn.Sequential]:
    """Build VGG's own classifier: two hidden layers on the features of all positions.

    Architecture: Simonyan and Zisserman 2014, arXiv:1409.1556. The layers have torchvision's names. With 4,096
    hidden units it has 119.5 million weights.
    """
    return nn.AdaptiveAvgPool2d(SIDE), nn.Sequential(
        nn.Linear(CHANNELS * SIDE * SIDE, hidden),  # (n, hidden)
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),  # (n, hidden)
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def mlp(num_classes: int, hidden: int, dropout: float) -> tuple[nn.Module, nn.Sequential]:
    """Build an MLP with one hidden layer on the mean of each channel over all positions.

    Global average pooling is from Lin, Chen and Yan 2013, "Network in Network", arXiv:1312.4400. With 256
    hidden units the head has 132 thousand weights.
    """
    return nn.AdaptiveAvgPool2d(1), nn.Sequential(
        nn.Linear(CHANNELS, hidden),  # (n, hidden)
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def linear(num_classes: int) -> tuple[nn.Module, nn.Sequential]:
    """Build a linear probe: one linear layer on the features of all positions, without dropout.

    Alain and Bengio 2016, arXiv:1610.01644. It has 25,089 weights per class.
    """
    return nn.AdaptiveAvgPool2d(SIDE), nn.Sequential(nn.Linear(CHANNELS * SIDE * SIDE, num_classes))


def detect_head(state: Mapping[str, Tensor]) -> HeadSize | None:
    """Which head a state dict's `classifier.` tensors are of, with any number of classes; None if of none."""
    found = [name for name in state if re.fullmatch(r"classifier\.\d+\.weight", name)]
    shapes = [tuple(state[name].shape) for name in sorted(found, key=_number)]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        return None
    chained = all(outputs == inputs for (outputs, _), (_, inputs) in pairwise(shapes))
    hidden = [outputs for outputs, _ in shapes[:-1]]
    name = _STRUCTURES.get((shapes[0][1], len(hidden)))
    if name is None or not chained or len(set(hidden)) > 1:
        return None
    return HeadSize(name, hidden[0] if hidden else 0)


def last_layer(state: Mapping[str, Tensor]) -> str:
    """Return the prefix of the last classifier layer's names, such as `classifier.6.`; empty without one."""
    numbers = [_number(name) for name in state if re.match(r"classifier\.\d+\.", name)]
    return f"classifier.{max(numbers)}." if numbers else ""


def _number(name: str) -> int:
    return int(name.split(".")[1])


def init_like_torchvision(classifier: nn.Module) -> None:
    """Weights as a new VGG of torchvision has them: normally distributed with deviation 0.01, biases 0."""
    for layer in classifier.modules():
        if isinstance(layer, nn.Linear):
            torch.nn.init.normal_(layer.weight, 0, 0.01)
            torch.nn.init.zeros_(layer.bias)
