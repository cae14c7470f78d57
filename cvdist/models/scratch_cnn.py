"""The CNN that chapter 6 of the book trains from scratch, in two sizes: for digits and for photographs.

The book prints convolutions with kernel size 3. But its flattened sizes, 320 for 28x28 digits and 56180 for
224x224 photographs, are those of kernel size 5, so that is used here.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn

from cvdist.config import ModelConfig
from cvdist.models.registry import InputSpec, ModelSpec, register

KERNEL = 5
POOL = 2


def side_after_convolutions(side: int) -> int:
    """Return the height or width of the feature maps after both convolutions and poolings, for a given side."""
    for _ in range(2):
        side = (side - (KERNEL - 1)) // POOL
    return side


SMALLEST_SIDE = next(side for side in itertools.count(1) if side_after_convolutions(side) > 0)


class LogSoftmax(nn.Module):
    """Log-softmax over dimension 1, in float32 or float64."""

    def forward(self, scores: Tensor) -> Tensor:
        """Convert scores (n, classes) to log-probabilities (n, classes), float32, or float64 for float64."""
        # Autocast casts to float32 by itself on GPUs only; on CPUs the loss would be a bfloat16 number.
        return scores.log_softmax(dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))


def scratch_cnn(input: InputSpec, num_classes: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Build the network, with PyTorch's default initialization. Every layer is a named module, for hooks.

    It takes float (n, channels, height, width) and returns log-probabilities (n, num_classes), for `nll_loss`.
    Architecture: chapter 6 of the book.

    Args:
        input: shape of a picture; sides of `SMALLEST_SIDE` pixels or more, any number of channels.
        num_classes: number of outputs.
        hidden: sizes of the linear layers between the convolutions and the output layer.
        dropout: probability that training drops a channel of conv2 or a hidden activation.
    """
    # The shapes are those of a batch of n 1x28x28 pictures.
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(input.channels, 10, KERNEL),  # (n, 10, 24, 24)
        "conv1_pool": nn.MaxPool2d(POOL),  # (n, 10, 12, 12)
        # After the pooling, which leaves it a quarter of the work and the same result.
        "conv1_relu": nn.ReLU(),
        "conv2": nn.Conv2d(10, 20, KERNEL),  # (n, 20, 8, 8)
        "conv2_dropout": nn.Dropout2d(dropout),
        "conv2_pool": nn.MaxPool2d(POOL),  # (n, 20, 4, 4)
        "conv2_relu": nn.ReLU(),
        "flatten": nn.Flatten(),  # (n, 320)
    }
    features = 20 * side_after_convolutions(input.height) * side_after_convolutions(input.width)
    for i, outputs in enumerate(hidden, start=1):
        layers[f"fc{i}"] = nn.Linear(features, outputs)  # (n, 50)
        layers[f"fc{i}_relu"] = nn.ReLU()
        layers[f"fc{i}_dropout"] = nn.Dropout(dropout)
        features = outputs
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(features, num_classes)  # (n, num_classes)
    layers["log_softmax"] = LogSoftmax()
    return nn.Sequential(OrderedDict(layers))


def _problem(input: InputSpec) -> str:
    if min(input.height, input.width) >= SMALLEST_SIDE:
        return ""
    least, given = f"{SMALLEST_SIDE}x{SMALLEST_SIDE}", f"{input.height}x{input.width}"
    return f"takes pictures of {least} pixels or more, these are {given}"


def _register(name: str, default_input: InputSpec, hidden: tuple[int, ...]) -> None:
    def build(input: InputSpec, num_classes: int, settings: ModelConfig) -> nn.Module:
        return scratch_cnn(input, num_classes, hidden, settings.dropout)

    register(ModelSpec(name, default_input, _problem, build))


_register("scratch-cnn", InputSpec(channels=1, height=28, width=28), hidden=(50,))
_register("scratch-cnn-photo", InputSpec(channels=3, height=224, width=224), hidden=(500, 50))
