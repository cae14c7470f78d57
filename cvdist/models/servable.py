"""A trained classifier with its preprocessing: pixels in, probabilities out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ServableClassifier(nn.Module):
    """Normalises as in training, so that whoever serves the model can't get that wrong.

    Takes uint8 pixels (n, C, H, W), returns float32 probabilities (n, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean`, `std`: by channel, for pixels in [0, 1]; `classifier` returns (log-)scores."""
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities of the classes."""
        normalised = (pixels.float() / 255 - self.mean) / self.std
        # A softmax of log-probabilities gives the probabilities back, so both kinds of score are served.
        return self.classifier(normalised).softmax(1)
