"""How workers agree, every second or so, on what only one of them may know: that it is time to stop.

A signal reaches one process, at any moment; workers that stop at different steps would wait for each other for
ever. So they confer after steps that all of them reach, and act on the highest answer. After how many steps
they confer next follows from the slowest worker's pace, which all of them learn in the same exchange.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cvdist.distributed.worker import StopRequest
from cvdist.errors import superseded_by_another_job

_MOST = 4096  # steps between two exchanges


class StopConsensus:
    """The exchanges of one worker."""

    def __init__(self, seconds: float, timeout: float) -> None:
        """`seconds`: about how often; a slow step is followed by an exchange each time.

        timeout: seconds that one worker waits for the others in an exchange.
        """
        self._seconds = seconds
        self._left = 1
        self._taken = 0
        self._since = time.monotonic()
        # Apart from the gradients' group: nothing here waits for a GPU.
        self._group: Any = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def due(self) -> bool:
        """Whether the workers confer now; to be called once a step."""
        self._left -= 1
        self._taken += 1
        return self._left <= 0

    def agree(self, answer: StopRequest) -> StopRequest:
        """The highest answer of all workers. All of them call it when it is `due`.

        Raises:
            Superseded: on all workers, if that is STOP.
        """
        now = time.monotonic()
        pace = (now - self._since) / self._taken
        values = torch.tensor([float(answer), pace], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        highest, slowest = values.tolist()
        self._left = min(max(int(self._seconds / max(slowest, 1e-6)), 1), _MOST)
        self._taken, self._since = 0, now
        if highest == StopRequest.ABORT:
            raise superseded_by_another_job()
        return StopRequest(int(highest))
