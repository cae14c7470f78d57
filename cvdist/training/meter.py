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
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0
        self._started = time.monotonic()

    def add(self, loss_sum: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Count a portion: its summed loss (scalar), scores (n, classes), labels int64 (n,)."""
        if len(labels):
            self._loss.add_(loss_sum)
            self._correct.add_((scores.argmax(1) == labels).sum())
            self._count += len(labels)

    def take(self) -> tuple[float, int, int, float]:
        """Summed loss, correct, samples of all workers since the last call, and the seconds that it took.

        All workers call it equally often.
        """
        count = torch.tensor(self._count, dtype=torch.float64, device=self._loss.device)
        sums = sum_over_workers(torch.stack([self._loss, self._correct.double(), count]))
        loss, correct, total = sums.tolist()
        self._loss.zero_()
        self._correct.zero_()
        self._count = 0
        now = time.monotonic()
        seconds, self._started = max(now - self._started, 1e-9), now
        return loss, int(correct), int(total), seconds
