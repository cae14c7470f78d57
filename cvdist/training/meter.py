"""Running sums of a training epoch. They stay on the device, so that no step has to wait for their values."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cvdist.distributed.collectives import sum_over_workers
from cvdist.distributed.traffic import Traffic
from cvdist.training.loss import correct

T = TypeVar("T")


@dataclass(frozen=True)
class StepStats:
    """Measurements of some steps, over all workers.

    Attributes:
        loss: Sum of the samples' losses.
        correct: Number of correct predictions.
        count: Number of samples.
        steps: Number of steps.
        seconds: How long these steps took together.
        data_seconds: Seconds that a worker waited for data in a step, on average.
        communication_seconds: Seconds that a worker waited for other workers in a step, on average.
        bytes_sent: Bytes that a worker sent in a step, on average.
    """

    loss: float
    correct: int
    count: int
    steps: int
    seconds: float
    data_seconds: float
    communication_seconds: float
    bytes_sent: float

    @property
    def compute_seconds(self) -> float:
        """Seconds of a step without data and communication: computing and, with a GPU, waiting for it."""
        each = self.seconds / max(self.steps, 1)
        return max(each - self.data_seconds - self.communication_seconds, 0.0)


class Meter:
    """Counts losses, correct predictions and times from one `take` to the next."""

    def __init__(self, device: torch.device, traffic: Traffic, *, multilabel: bool = False) -> None:
        """Start at zero.

        Args:
            device: Where the sums stay.
            traffic: Counts what this worker sends. It starts at zero as well.
            multilabel: Whether a picture may have several classes.
        """
        self._traffic, self._multilabel = traffic, multilabel
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count, self._steps, self._data_seconds = 0, 0, 0.0
        self._started = time.monotonic()
        self._taken, self._taken_loss, self._taken_correct = 0, 0.0, 0
        traffic.take()

    def add(self, loss_sum: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Count a micro-batch.

        Args:
            loss_sum: Sum of the samples' losses, a scalar.
            scores: float (m, classes).
            labels: As in `Batch.labels`.
        """
        if len(labels):
            self._loss.add_(loss_sum)
            self._correct.add_(correct(scores, labels, multilabel=self._multilabel).sum())
            self._count += len(labels)

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield `batches`, one for each step, and count the time that each of them takes to arrive."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_seconds += time.perf_counter() - began
            self._steps += 1
            yield batch

    def so_far(self) -> tuple[float, float]:
        """Return the mean loss and accuracy of this epoch; after the last `take`, of this worker alone."""
        loss, correct = self._taken_loss + float(self._loss), self._taken_correct + int(self._correct)
        count = max(self._taken + self._count, 1)
        return loss / count, correct / count

    def take(self) -> StepStats:
        """Return what all workers counted since the last call. All of them must call it equally often."""
        sent, waited = self._traffic.take()
        mine = [float(self._count), self._data_seconds, waited, sent, 1.0]
        counts = torch.tensor(mine, dtype=torch.float64, device=self._loss.device)
        sums = sum_over_workers(torch.cat([self._loss.view(1), self._correct.double().view(1), counts]))
        loss, correct, total, *means, workers = sums.tolist()
        self._loss.zero_()
        self._correct.zero_()
        now = time.monotonic()
        seconds, steps = max(now - self._started, 1e-9), self._steps
        data, communication, size = (value / workers / max(steps, 1) for value in means)
        self._count, self._steps, self._data_seconds, self._started = 0, 0, 0.0, now
        self._taken, self._taken_loss = self._taken + int(total), self._taken_loss + loss
        self._taken_correct += int(correct)
        return StepStats(loss, int(correct), int(total), steps, seconds, data, communication, size)
