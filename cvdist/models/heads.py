"""Trained heads on what a pretrained network computes: VGG's own classifier, a small MLP, or one linear layer.

On maps, a head is a pooling layer and a `classifier`; on a vector it takes the place of the network's last
layer. It is an `nn.Sequential` of `Linear`, `ReLU` and `Dropout` layers, whose first two linear layers can be
split over workers, by columns and by rows.
"""

from __future__ import annotations

import torch
from torch import nn

from cvdist.config import HeadSize

SIDE = 7  # height and width that maps are pooled to for the heads `vgg` and `linear`


def build(
    size: HeadSize, dropout: float, num_classes: int, shape: tuple[int, ...]
) -> tuple[nn.Module, nn.Sequential]:
    """Build a head with PyTorch's default random weights, on the default device.

    Args:
        size: The kind of head, and the size of its hidden layers.
        dropout: Probability that training drops a hidden activation.
        num_classes: Number of outputs.
        shape: Shape of what the head reads of one picture: maps (C, H, W), or a vector (d,).

    Returns:
        The pooling, which a head on a vector does not need, and the classifier, from (n, inputs) to (n,
        num_classes).
    """
    side = 1 if size.name == "mlp" or len(shape) == 1 else SIDE
    inputs = shape[0] * side**2
    layers: list[nn.Module] = []
    # VGG has two hidden layers (Simonyan and Zisserman 2014, arXiv:1409.1556). An MLP reads the mean of
    # each channel (Lin, Chen and Yan 2013, "Network in Network", arXiv:1312.4400). One linear layer is a probe
    # (Alain and Bengio 2016, arXiv:1610.01644).
    for _ in range({"vgg": 2, "mlp": 1, "linear": 0}[size.name]):
        layers += [nn.Linear(inputs, size.hidden_size), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        inputs = size.hidden_size
    return nn.AdaptiveAvgPool2d(side), nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def init_like_torchvision(classifier: nn.Module) -> None:
    """Initialize weights as torchvision's VGG does: normally distributed with deviation 0.01, biases 0."""
    for layer in classifier.modules():
        if isinstance(layer, nn.Linear):
            torch.nn.init.normal_(layer.weight, 0, 0.01)
            torch.nn.init.zeros_(layer.bias)
