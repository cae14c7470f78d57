"""A trained classifier with its preprocessing, for serving: it takes pixels and returns probabilities."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def probabilities(scores: Tensor, *, multilabel: bool) -> Tensor:
    """Compute a classifier's probabilities, float32 (n, classes).

    Args:
        scores: What it returns, float (n, classes): scores or log-probabilities.
        multilabel: Whether each class has a probability of its own (`ModelIdentity.multilabel`).
    """
    if multilabel:
        # In float32 without a cast, as an exported graph insists on the dtype that a cast was given.
        return (scores + scores.new_zeros(1, dtype=torch.float32)).sigmoid()
    # A softmax of log-probabilities gives the probabilities back, so both kinds of score are fine.
    return scores.softmax(1, dtype=torch.float32)


def log_probabilities(scores: Tensor, *, multilabel: bool) -> Tensor:
    """Compute the logarithms of `probabilities`, float32 (n, classes), which stay exact for small values."""
    scores = scores.float()
    return F.logsigmoid(scores) if multilabel else scores.log_softmax(1)


class ServableClassifier(nn.Module):
    """A classifier that includes the normalization it was trained with.

    It takes uint8 pixels (n, C, H, W) and returns float32 probabilities (n, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, classifier: nn.Module, mean: Sequence[float], std: Sequence[float], *, multilabel: bool
    ) -> None:
        """Wrap a classifier.

        Args:
            classifier: takes normalized pictures, and returns scores or log-probabilities (n, classes).
            mean: mean for each channel, for pixels in [0, 1].
            std: standard deviation for each channel, for pixels in [0, 1].
            multilabel: as in `probabilities`.
        """
        super().__init__()
        self.classifier, self.multilabel = classifier, multilabel
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute class probabilities, float32 (n, classes), from uint8 pixels (n, C, H, W)."""
        normalized = (pixels.float() / 255 - self.mean) / self.std
        normalized = normalized.contiguous(memory_format=torch.channels_last)  # convolutions are faster on it
        return probabilities(self.classifier(normalized), multilabel=self.multilabel)


def servable(
    classifier: nn.Module, mean: Sequence[float], std: Sequence[float], *, multilabel: bool
) -> ServableClassifier:
    """Copy a classifier and its normalization to the CPU, as exported: evaluation mode, channels last."""
    copied = ServableClassifier(copy.deepcopy(classifier).cpu(), mean, std, multilabel=multilabel).eval()
    return copied.to(memory_format=torch.channels_last)
