"""Exact results of a model on validation data, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvdist.data.dataset import Batch
from cvdist.distributed.collectives import gather, sum_over_workers
from cvdist.distributed.precision import Precision
from cvdist.results import Evaluation, Mistake
from cvdist.training.run import Run

_MISTAKES = 16  # that an evaluation keeps


def validate(run: Run) -> Evaluation:
    """Evaluate the model, or its moving average, on all validation samples. All workers must call this."""
    result = evaluate(
        run.evaluated_module(),
        run.mode.valid_batches(run.loader, run.config.loop.valid_batch_size),
        len(run.info.classes),
        run.worker.device,
        run.precision,
        counts=run.mode.counts,
    )
    if result.total != run.info.valid_size:
        raise RuntimeError(f"validated {result.total} of {run.info.valid_size} samples")
    return result


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: int,
    device: torch.device,
    precision: Precision,
    *,
    counts: bool = True,
) -> Evaluation:
    """Evaluate `model` on the batches of all workers. All of them must call this.

    Each worker computes its own batches, and the sums are reduced once, at the end. Unless the model itself is
    split over the workers, no worker waits for another before that, and their numbers of batches may differ.

    Args:
        model: The model, which is in evaluation mode meanwhile.
        batches: This worker's batches.
        classes: Number of classes.
        device: Where the model and the batches are.
        precision: The precision of forward passes.
        counts: Whether this worker's batches count. If all workers have the same ones, only rank 0's do.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    mistakes: list[Mistake] = []
    for batch in batches:
        with precision.autocast():
            scores = model(batch.images)
        if not counts:
            continue
        scores = scores.float()
        loss += F.cross_entropy(scores, batch.labels, reduction="sum")
        confidence, predicted = scores.softmax(1).max(1)
        confusion += torch.bincount(batch.labels * classes + predicted, minlength=classes * classes)
        mistakes = most_confident(mistakes + _mistakes(batch, predicted, confidence))
    model.train(was_training)
    confusion = sum_over_workers(confusion).view(classes, classes).cpu()
    total = int(confusion.sum())
    return Evaluation(
        loss=sum_over_workers(loss).item() / max(total, 1),
        correct=int(confusion.diagonal().sum()),
        total=total,
        confusion=confusion,
        mistakes=most_confident([mistake for some in gather(mistakes) for mistake in some]),
    )


def most_confident(mistakes: list[Mistake]) -> list[Mistake]:
    """Return the mistakes that were made with most confidence, at most 16 of them.

    Ties are broken by row, so that any number of workers gives the same list.
    """
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:_MISTAKES]


def _mistakes(batch: Batch, predicted: Tensor, confidence: Tensor) -> list[Mistake]:
    wrong = (predicted != batch.labels).nonzero().flatten()
    most = wrong[confidence[wrong].argsort(descending=True)[:_MISTAKES]]
    columns = (batch.indices[most.cpu()], batch.labels[most], predicted[most], confidence[most])
    return [Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
