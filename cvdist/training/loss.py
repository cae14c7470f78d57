"""The loss, and which predictions are right, for pictures with one class each or with several."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def loss_sum(
    scores: Tensor, labels: Tensor, *, multilabel: bool, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Compute the sum of the pictures' losses.

    It is cross-entropy; where a picture may have several classes, binary cross-entropy of each class, averaged
    over the classes as `BCEWithLogitsLoss` does.

    Args:
        scores: float (n, classes).
        labels: int64 (n,), or the shares of the classes, float (n, classes).
        multilabel: Whether a picture may have several classes. Its labels are then 1 for its classes.
        weights: The weight of each class, (classes,); of several classes, that of having the class.
        smoothing: Share of each target that is spread evenly: over all classes, or over having one and not.
    """
    if not multilabel:
        return F.cross_entropy(scores, labels, weights, reduction="sum", label_smoothing=smoothing)
    targets = labels.to(scores.dtype) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(scores, targets, pos_weight=weights, reduction="sum")
    return losses / scores.shape[1]


def correct(scores: Tensor, labels: Tensor, *, multilabel: bool) -> Tensor:
    """Return which pictures are classified correctly, bool (n,). Of mixtures, the larger share counts.

    Args:
        scores: float (n, classes).
        labels: int64 (n,), or the shares of the classes, float (n, classes).
        multilabel: Whether a picture may have several classes. It is then correct if it is said to have exactly
            its classes, each at a probability of 0.5.
    """
    if multilabel:
        return ((scores >= 0) == (labels > 0.5)).all(1)
    return scores.argmax(1) == (labels.argmax(1) if labels.ndim == 2 else labels)
