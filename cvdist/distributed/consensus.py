"""Lets workers agree, every second or two, that it is time to stop, which only one of them may know.

A signal reaches one process, at any moment; workers that stop at different steps would wait for each other
forever. So they exchange requests after steps that all of them reach, and all act on the most urgent one. The
number of steps until the next exchange follows from the slowest worker's pace, which the same exchange tells.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import superseded_by_another_job

_MAX_STEPS = 4096  # between two exchanges


class StopConsensus:
    """One worker's side of the exchanges. All workers must create theirs at the same time."""

    def __init__(self, seconds: float, timeout: float) -> None:
        """Join the group in which the exchanges happen.

        Args:
            seconds: Approximate time between two exchanges. Each slow step is followed by one.
            timeout: Seconds that one worker waits for the others in an exchange.
        """
        self._seconds = seconds
        self._steps_left = 1
        self._steps_taken = 0
        self._since = time.monotonic()
        # Apart from the gradients' group: nothing here waits for a GPU.
        self._group: Any = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def due(self) -> bool:
        """Return whether the workers exchange their requests after this step. Call this once a step."""
        self._steps_left -= 1
        self._steps_taken += 1
        return self._steps_left <= 0

    def agree(self, request: StopRequest) -> StopRequest:
        """Exchange requests. All workers must call this when it is `due`.

        Returns:
            The most urgent request of all workers, the same on all of them.

        Raises:
            Superseded: If that is ABORT.
        """
        now = time.monotonic()
        step_seconds = (now - self._since) / self._steps_taken
        values = torch.tensor([float(request), step_seconds], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        highest, slowest = values.tolist()
        self._steps_left = min(max(int(self._seconds / max(slowest, 1e-6)), 1), _MAX_STEPS)
        self._steps_taken, self._since = 0, now
        if highest == StopRequest.ABORT:
            raise superseded_by_another_job()
        return StopRequest(int(highest))
