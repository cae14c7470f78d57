"""Running sums of a training phase, kept on the device: the step never waits for their values."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cvdist.distributed.collectives import sum_over_workers
from cvdist.distributed.traffic import Traffic

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """Some steps, over all workers.

    loss: summed; correct, count: samples; seconds: that they took. The others are means over the workers, of a
    step: seconds of waiting for data and for other workers, and bytes sent to them.
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
        """What is left of a step: computing, and on a GPU waiting for it."""
        each = self.seconds / max(self.steps, 1)
        return max(each - self.data_seconds - self.communication_seconds, 0.0)


class Meter:
    """Loss, correct predictions and times since the last `take`."""

    def __init__(self, device: torch.device, traffic: Traffic) -> None:
        """Sums live on `device`; `traffic`: what this worker sends."""
        self._traffic = traffic
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count, self._steps, self._data_seconds = 0, 0, 0.0
        self._started = time.monotonic()
        traffic.take()

    def add(self, loss_sum: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Count a portion: its summed loss (scalar), scores (n, classes), labels int64 (n,)."""
        if len(labels):
            self._loss.add_(loss_sum)
            self._correct.add_((scores.argmax(1) == labels).sum())
            self._count += len(labels)

    def waiting_for(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, each a step, with the time until it is there."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_seconds += time.perf_counter() - began
            self._steps += 1
            yield batch

    def take(self) -> Measured:
        """What there was since the last call. All workers call it equally often."""
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
        return Measured(loss, int(correct), int(total), steps, seconds, data, communication, size)
