"""Memory for batches that is used again: new memory costs a page fault for every 4 KiB of it."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Tensors whose memory returns here when the last reference to them is gone. Safe for several threads."""

    def __init__(self, *, pinned: bool) -> None:
        """`pinned`: memory that GPUs copy from."""
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU."""
        size = int(np.prod(shape)) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            free = self._free[size]
            memory = free.pop() if free else None
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        # Only the tensor that is handed out keeps this array: they go together.
        array = memory.numpy()
        tensor = torch.from_numpy(array).view(dtype).view(shape)
        weakref.finalize(array, self._give_back, size, memory)
        return tensor

    def _give_back(self, size: int, memory: Tensor) -> None:
        with self._lock:
            self._free[size].append(memory)
