"""Running sums of a training phase, kept on the device: the step never waits for their values."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cvdist.training.collectives import sum_over_workers


class Meter:
    """Loss and correct predictions since the last `take`."""

    def __init__(self, device: torch.device) -> None:
        """Sums live on `device`."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._started = time.monotonic()

    def add(self, loss_sum: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Count a portion: its summed loss (scalar), scores (n, classes), labels int64 (n,)."""
        if len(labels):
            self._sums[0] += loss_sum
            self._sums[1] += (scores.argmax(1) == labels).sum()
            self._sums[2] += len(labels)

    def take(self) -> tuple[float, int, int, float]:
        """Summed loss, correct, samples of all workers since the last call, and the seconds that it took.

        All workers call it equally often.
        """
        loss, correct, count = sum_over_workers(self._sums.clone()).tolist()
        self._sums.zero_()
        now = time.monotonic()
        seconds, self._started = max(now - self._started, 1e-9), now
        return loss, int(correct), int(count), seconds
