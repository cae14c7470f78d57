"""A node's copy of the features, from which batches are gathered while other shards still arrive.

The copy is either memory-mapped from the node's disk or, if there is room, in the memory of the GPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvdist.data.contents import map_ahead
from cvdist.data.dataset import to_device
from cvdist.errors import UserError
from cvdist.features import shard
from cvdist.features.local import LocalShards

_AHEAD = 2  # batches that are gathered while a GPU computes


@dataclass(frozen=True)
class FeatureRows:
    """Places of features: numbers of shards, rows in them, and views, each int64 (n,)."""

    shard: np.ndarray
    row: np.ndarray
    view: np.ndarray


class MappedCopy:
    """Features in memory-mapped shards on the node's disk. Shards are fetched in the order of their use."""

    def __init__(
        self, shards: LocalShards, *, fetch_threads: int, timeout: float, window: int = 0, pinned: bool = False
    ) -> None:
        """Set up the copy; nothing is fetched yet.

        Args:
            shards: the shards on this node.
            fetch_threads: number of shards that are fetched at the same time.
            timeout: seconds that a batch waits for a shard.
            window: number of shards that are shuffled together, if the node has no room for all of them; the
                shards of about three windows are kept. 0: all shards are kept.
            pinned: whether batches are put into pinned memory, for copies to a GPU.
        """
        self.cache, self.shape = shards.cache, shards.cache.feature_shape
        self.dtype = shard.DTYPES[shards.cache.fingerprint.dtype]
        self._shards, self._timeout, self._window, self._pinned = shards, timeout, window, pinned
        self._size = math.prod(self.shape) * self.dtype.itemsize
        self._views = np.array([entry.views for entry in self.cache.shards], dtype=np.int64)
        self._fetching = ThreadPoolExecutor(fetch_threads, thread_name_prefix="fetch")
        self._gathering = ThreadPoolExecutor(1, thread_name_prefix="gather")
        self._lock = threading.Lock()
        self.arriving: dict[int, Future[memoryview]] = {}
        # Shards that have arrived, if all are kept. Empty with a window: `values` has to see each use.
        self._ready: list[memoryview | None] = [None] * len(self.cache.shards)
        self._sequence: list[int] = []
        self._place: dict[int, int] = {}
        self._next = 0

    def expect(self, numbers: Sequence[int] | np.ndarray) -> None:
        """Begin to fetch shards in the order in which they will be needed; repetitions are ignored."""
        sequence = list(dict.fromkeys(np.asarray(numbers).tolist()))
        with self._lock:
            self._sequence, self._place, self._next = sequence, {s: i for i, s in enumerate(sequence)}, 0
        self._reach(0)

    def batches(self, wanted: Iterable[FeatureRows]) -> Iterator[Tensor]:
        """Yield the features (n, ...) of each batch in order, on the CPU and in the stored dtype.

        Raises:
            UserError: if a shard can't be fetched or takes longer than the timeout.
        """
        if self._pinned:
            return map_ahead(self._gathering, self.gather, wanted, _AHEAD)
        # Where a CPU computes, handing a batch from thread to thread takes longer than gathering it.
        return map(self.gather, wanted)

    def gather(self, rows: FeatureRows) -> Tensor:
        """Return the features (n, ...) of some rows, in this thread.

        Raises:
            UserError: if a shard can't be fetched or takes longer than the timeout.
        """
        if not len(rows.row):
            return torch.empty(0, *self.shape, dtype=self.dtype)
        starts = ((rows.row * self._views[rows.shard] + rows.view) * self._size).tolist()
        size, parts = self._size, []
        for number, start in zip(rows.shard.tolist(), starts, strict=True):
            values = self._ready[number] or self.values(number)
            parts.append(values[start : start + size])
        # One copy by C, for which Python's lock is free: twice as fast as copying row by row from here.
        features = torch.frombuffer(bytearray().join(parts), dtype=self.dtype).view(-1, *self.shape)
        return features.pin_memory() if self._pinned else features

    def forget(self, number: int) -> None:
        """Release a shard. It is mapped or fetched again if it is needed."""
        with self._lock:
            self.arriving.pop(number, None)
            self._ready[number] = None

    def close(self) -> None:
        """Cancel all fetches and gathers that have not begun."""
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self._gathering.shutdown(wait=False, cancel_futures=True)

    def values(self, number: int) -> memoryview:
        """Return the bytes of all features of a shard, and wait for it if it is still being fetched.

        Raises:
            UserError: if the shard can't be fetched or takes longer than the timeout.
        """
        if self._window:
            self._reach(self._place.get(number, 0))
        with self._lock:
            arriving = self.arriving.get(number)
            if arriving is None:
                arriving = self.arriving[number] = self._fetching.submit(self._fetch, number)
        try:
            values = arriving.result(self._timeout)
            if not self._window:
                self._ready[number] = values
            return values
        except TimeoutError:
            entry = self._shards.cache.shards[number]
            raise UserError(
                f"waited {self._timeout:g} s for {entry.object} of the features: raise --data-timeout, or look "
                "at the storage that they come from"
            ) from None
        except UserError:
            with self._lock:
                self.arriving.pop(number, None)  # who asks again, tries again
            raise

    def _reach(self, place: int) -> None:
        """Fetch ahead of the shard at `place` in the sequence, and release shards behind the window."""
        with self._lock:
            if not self._window:
                stop = len(self._sequence)
            else:
                first = place // self._window
                stop = min(len(self._sequence), (first + 2) * self._window)
                behind = (first - 1) * self._window
                for number in [n for n in self.arriving if self._place.get(n, -1) < behind]:
                    if self.arriving[number].done():
                        del self.arriving[number]
            for number in self._sequence[self._next : stop]:
                if number not in self.arriving:
                    self.arriving[number] = self._fetching.submit(self._fetch, number)
            self._next = max(self._next, stop)

    def _fetch(self, number: int) -> memoryview:
        values: Any = self._shards.open(number).flatten().view(torch.uint8).numpy()
        return memoryview(values)


class DeviceCopy:
    """All features in the memory of the training device."""

    def __init__(self, source: MappedCopy, device: torch.device) -> None:
        """Set up the copy. It is loaded from `source` when it is first used."""
        self.shape, self.dtype = source.shape, source.dtype
        self._source, self._device = source, device
        cache = source.cache
        counts = [entry.rows * entry.views for entry in cache.shards]
        self._first = np.cumsum([0, *counts])
        self._views = np.array([entry.views for entry in cache.shards], dtype=np.int64)
        self._all: Tensor | None = None

    def expect(self, numbers: Sequence[int] | np.ndarray) -> None:
        if self._all is None:
            self._source.expect(range(len(self._views)))

    def places(self, rows: FeatureRows) -> Tensor:
        """Return where some rows are, int64 (n,) on the device, for `at`."""
        flat = torch.from_numpy(self._first[rows.shard] + rows.row * self._views[rows.shard] + rows.view)
        return to_device(flat, self._device)

    def at(self, places: Tensor) -> Tensor:
        """Return features (n, ...) on the device. The first call loads all features."""
        if self._all is None:
            self._all = self._load()
        return self._all.index_select(0, places)

    def close(self) -> None:
        self._source.close()

    @torch.inference_mode(False)  # whatever the first use is: its tensors are to be trained from
    def _load(self) -> Tensor:
        loaded = torch.empty(int(self._first[-1]), *self.shape, dtype=self.dtype, device=self._device)
        self._source.expect(range(len(self._views)))
        for number in range(len(self._views)):
            values = torch.frombuffer(self._source.values(number), dtype=self.dtype)
            here = loaded[self._first[number] : self._first[number + 1]]
            here.copy_(values.view(here.shape))
            self._source.forget(number)
        return loaded


Copy = MappedCopy | DeviceCopy
