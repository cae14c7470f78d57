"""Exact results of a model on validation data, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvdist.data.dataset import Batch
from cvdist.distributed.collectives import gather, sum_over_workers
from cvdist.distributed.precision import Arithmetic
from cvdist.results import Evaluation, Mistake

_KEEP_WRONG = 16


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: int,
    device: torch.device,
    arithmetic: Arithmetic,
    *,
    counts: bool = True,
) -> Evaluation:
    """Each worker runs `model` over its own batches; the sums are reduced once, at the end.

    In between no worker waits for another, so their numbers of batches may differ, unless the model itself is
    split over them. counts: false on all workers but one where all of them have the same batches.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    mistakes: list[Mistake] = []
    for batch in batches:
        with arithmetic.autocast():
            scores = model(batch.images)
        if not counts:
            continue
        scores = scores.float()
        loss += F.cross_entropy(scores, batch.labels, reduction="sum")
        confidence, predicted = scores.softmax(1).max(1)
        confusion += torch.bincount(batch.labels * classes + predicted, minlength=classes * classes)
        mistakes = _most_confident(mistakes + _mistakes(batch, predicted, confidence))
    model.train(was_training)
    confusion = sum_over_workers(confusion).view(classes, classes).cpu()
    total = int(confusion.sum())
    return Evaluation(
        loss=sum_over_workers(loss).item() / max(total, 1),
        correct=int(confusion.diagonal().sum()),
        total=total,
        confusion=confusion,
        mistakes=_most_confident([mistake for part in gather(mistakes) for mistake in part]),
    )


def _mistakes(batch: Batch, predicted: Tensor, confidence: Tensor) -> list[Mistake]:
    wrong = (predicted != batch.labels).nonzero().flatten()
    most = wrong[confidence[wrong].argsort(descending=True)[:_KEEP_WRONG]]
    columns = (batch.indices[most.cpu()], batch.labels[most], predicted[most], confidence[most])
    return [Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _most_confident(mistakes: list[Mistake]) -> list[Mistake]:
    # The row breaks ties, so that any number of workers gives the same list.
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:_KEEP_WRONG]
