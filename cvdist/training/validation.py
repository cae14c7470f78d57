"""Exact results of a model on validation data, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cvdist import multilabel
from cvdist.data.dataset import Batch
from cvdist.data.sampler import partition
from cvdist.distributed.collectives import from_rank_zero, gather, sum_over_workers
from cvdist.distributed.precision import Precision
from cvdist.results import Evaluation, LabelResults, Mistake
from cvdist.training.loss import loss_sum
from cvdist.training.run import Run

_MISTAKES = 16  # that an evaluation keeps


def validate(run: Run) -> Evaluation:
    """Evaluate the model, or its moving average, on all validation samples. All workers must call this."""
    model, device, counts = run.evaluated_module(), run.worker.device, run.mode.counts
    batches = _with_progress(run, run.mode.valid_batches(run.loader, run.config.loop.valid_batch_size))
    if run.info.multilabel:
        truth = run.loader.labels("valid")
        result = evaluate_multilabel(model, batches, truth, device, run.precision, counts=counts)
    else:
        result = evaluate(model, batches, len(run.info.classes), device, run.precision, counts=counts)
    if result.total != run.info.valid_size:
        raise RuntimeError(f"validated {result.total} of {run.info.valid_size} samples")
    return result


def _with_progress(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield this worker's batches, and show which part of its pictures they are so far."""
    size, seen = run.info.valid_size, 0
    mine = len(partition(size, run.mode.rank, run.mode.world_size))
    for batch in batches:
        yield batch
        seen += len(batch.indices)
        if run.line.due():
            run.line.show(f"validation of {size:,} pictures  {seen / mine:.0%}", done=seen / mine)
    run.line.clear()


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
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    mistakes: list[Mistake] = []
    for batch, scores in _scored(model, batches, precision, counts=counts):
        loss += loss_sum(scores, batch.labels, multilabel=False)
        confidence, predicted = scores.softmax(1).max(1)
        confusion += torch.bincount(batch.labels * classes + predicted, minlength=classes * classes)
        mistakes = most_confident(mistakes + _mistakes(batch, predicted, confidence))
    confusion = sum_over_workers(confusion).view(classes, classes).cpu()
    total = int(confusion.sum())
    return Evaluation(
        loss=sum_over_workers(loss).item() / max(total, 1),
        correct=int(confusion.diagonal().sum()),
        total=total,
        confusion=confusion,
        mistakes=most_confident([mistake for some in gather(mistakes) for mistake in some]),
    )


@torch.inference_mode()
def evaluate_multilabel(
    model: nn.Module,
    batches: Iterable[Batch],
    truth: Tensor,
    device: torch.device,
    precision: Precision,
    *,
    counts: bool = True,
) -> Evaluation:
    """Evaluate a model of pictures that may have several classes on the batches of all workers.

    All of them must call this. What is exchanged is each picture's probabilities, once, at the end.

    Args:
        model: As in `evaluate`.
        batches: This worker's batches.
        truth: The labels of all validation pictures by row, bool (n, classes) on the CPU.
        device: Where the model and the batches are.
        precision: The precision of forward passes.
        counts: As in `evaluate`.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    probabilities = torch.zeros(truth.shape, device=device)
    for batch, scores in _scored(model, batches, precision, counts=counts):
        loss = loss_sum(scores, batch.labels, multilabel=True).double()
        sums += torch.stack([loss, loss.new_tensor(len(scores))])
        probabilities[batch.indices.to(device)] = scores.sigmoid()
    loss_total, total = sum_over_workers(sums).tolist()
    # Each row is of one worker, and 0 on the others, so the sum is exact.
    found = sum_over_workers(probabilities).cpu()

    def measure() -> Evaluation:
        thresholds = multilabel.best_thresholds(found, truth)
        counted = multilabel.count(found, truth, thresholds)
        average_precision = multilabel.average_precision(found, truth)
        curves = multilabel.precision_at_recall(found, truth)
        labels = LabelResults(average_precision, thresholds, counted, curves)
        mistakes = _most_wrong(found, truth, thresholds)
        return Evaluation(loss_total / max(total, 1), counted.exact, int(total), None, mistakes, labels)

    return from_rank_zero(measure)


def _scored(
    model: nn.Module, batches: Iterable[Batch], precision: Precision, *, counts: bool
) -> Iterator[tuple[Batch, Tensor]]:
    """Run the model in evaluation mode on all batches, and yield them with their scores if they count."""
    was_training = model.training
    model.eval()
    for batch in batches:
        with precision.autocast():
            scores = model(batch.images)
        if counts:
            yield batch, scores.float()
    model.train(was_training)


def _most_wrong(probabilities: Tensor, truth: Tensor, thresholds: Tensor) -> list[Mistake]:
    """Return the pictures with the most wrong classes, at most 16; of equals, those that are wrong by most."""
    away = probabilities.double() - thresholds
    taken = away >= 0
    wrong = taken != truth
    count, distance = wrong.sum(1).tolist(), (away.abs() * wrong).sum(1).tolist()
    rows = sorted(
        (row for row, wrongs in enumerate(count) if wrongs), key=lambda row: (-count[row], -distance[row])
    )
    return [Mistake(row, _numbers(truth[row]), _numbers(taken[row]), distance[row]) for row in rows[:_MISTAKES]]


def _numbers(chosen: Tensor) -> tuple[int, ...]:
    return tuple(chosen.nonzero().flatten().tolist())


def most_confident(mistakes: list[Mistake]) -> list[Mistake]:
    """Return the mistakes that were made with most confidence, at most 16 of them.

    Ties are broken by row, so that any number of workers gives the same list.
    """
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:_MISTAKES]


def _mistakes(batch: Batch, predicted: Tensor, confidence: Tensor) -> list[Mistake]:
    wrong = (predicted != batch.labels).nonzero().flatten()
    most = wrong[confidence[wrong].argsort(descending=True)[:_MISTAKES]]
    columns = (batch.indices[most.cpu()], batch.labels[most], predicted[most], confidence[most])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Mistake(index, (true,), (taken,), sure) for index, true, taken, sure in rows]
