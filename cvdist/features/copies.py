"""Rows of features from a node's copy of the shards: gathered across shards, while others still arrive."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvdist.data.dataset import to_device
from cvdist.errors import UserError
from cvdist.features import shard
from cvdist.features.local import LocalShards

_AHEAD = 2  # batches that are gathered while a GPU computes


@dataclass(frozen=True)
class Rows:
    """Which features: int64 (n,) each; numbers of shards, rows in them, and views."""

    shard: np.ndarray
    row: np.ndarray
    view: np.ndarray


class MappedCopy:
    """Shards mapped from the node's disk, fetched in the order in which they will be needed."""

    def __init__(
        self, shards: LocalShards, *, fetch_threads: int, timeout: float, window: int = 0, pinned: bool = False
    ) -> None:
        """`timeout`: seconds that a batch waits for a shard; pinned: into memory that GPUs copy from.

        window: shards that are used together, where the node has no room for all: then only those of about
        three windows are kept. 0: all are kept.
        """
        self.cache, self.shape = shards.cache, shards.cache.feature_shape
        self.dtype = shard.DTYPES[shards.cache.fingerprint.dtype]
        self._shards, self._timeout, self._window, self._pinned = shards, timeout, window, pinned
        self._size = math.prod(self.shape) * self.dtype.itemsize
        self._views = np.array([entry.views for entry in self.cache.shards], dtype=np.int64)
        self._fetching = ThreadPoolExecutor(fetch_threads, thread_name_prefix="fetch")
        self._gathering = ThreadPoolExecutor(1, thread_name_prefix="gather")
        self._lock = threading.Lock()
        self._arriving: dict[int, Future[memoryview]] = {}
        # What has arrived, where all of it is kept; with a window, `values` has to see each use.
        self._ready: list[memoryview | None] = [None] * len(self.cache.shards)
        self._sequence: list[int] = []
        self._place: dict[int, int] = {}
        self._next = 0

    def expect(self, numbers: Sequence[int] | np.ndarray) -> None:
        """Begin to fetch shards, which will be needed in this order; repetitions are left out."""
        sequence = list(dict.fromkeys(np.asarray(numbers).tolist()))
        with self._lock:
            self._sequence, self._place, self._next = sequence, {s: i for i, s in enumerate(sequence)}, 0
        self._reach(0)

    def batches(self, wanted: Iterable[Rows]) -> Iterator[Tensor]:
        """For each the features (n, ...) on the CPU, as they are stored, in order.

        Raises:
            UserError: if a shard can't be had, or takes longer than the timeout.
        """
        if not self._pinned:
            # Where a CPU computes, handing a batch from thread to thread takes longer than gathering it.
            yield from map(self.gather, wanted)
            return
        pending: deque[Future[Tensor]] = deque()
        for rows in wanted:
            pending.append(self._gathering.submit(self.gather, rows))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def gather(self, rows: Rows) -> Tensor:
        """Features (n, ...) of some rows, now.

        Raises:
            UserError: as `batches`.
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
        """Let go of a shard, which is fetched or mapped anew if it is asked for."""
        with self._lock:
            self._arriving.pop(number, None)
            self._ready[number] = None

    def close(self) -> None:
        """Stop fetching what has not begun."""
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self._gathering.shutdown(wait=False, cancel_futures=True)

    def values(self, number: int) -> memoryview:
        """All features of a shard, as bytes.

        Raises:
            UserError: as `batches`.
        """
        if self._window:
            self._reach(self._place.get(number, 0))
        with self._lock:
            arriving = self._arriving.get(number)
            if arriving is None:
                arriving = self._arriving[number] = self._fetching.submit(self._fetch, number)
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
                self._arriving.pop(number, None)  # who asks again, tries again
            raise

    def _reach(self, place: int) -> None:
        """Fetch ahead of the shard at `place` in the sequence, and let go of what lies behind it."""
        with self._lock:
            if not self._window:
                stop = len(self._sequence)
            else:
                first = place // self._window
                stop = min(len(self._sequence), (first + 2) * self._window)
                behind = (first - 1) * self._window
                for number in [n for n in self._arriving if self._place.get(n, -1) < behind]:
                    if self._arriving[number].done():
                        del self._arriving[number]
            for number in self._sequence[self._next : stop]:
                if number not in self._arriving:
                    self._arriving[number] = self._fetching.submit(self._fetch, number)
            self._next = max(self._next, stop)

    def _fetch(self, number: int) -> memoryview:
        values: Any = self._shards.open(number).flatten().view(torch.uint8).numpy()
        return memoryview(values)


class DeviceCopy:
    """All features in the memory of the device that trains."""

    def __init__(self, source: MappedCopy, device: torch.device) -> None:
        """Loads on the first use, from `source`."""
        self.shape, self.dtype = source.shape, source.dtype
        self._source, self._device = source, device
        cache = source.cache
        counts = [entry.rows * entry.views for entry in cache.shards]
        self._first = np.cumsum([0, *counts])
        self._views = np.array([entry.views for entry in cache.shards], dtype=np.int64)
        self._all: Tensor | None = None

    def expect(self, numbers: Sequence[int] | np.ndarray) -> None:
        """See `MappedCopy.expect`."""
        if self._all is None:
            self._source.expect(range(len(self._views)))

    def batches(self, wanted: Iterable[Rows]) -> Iterator[Tensor]:
        """See `MappedCopy.batches`; the tensors are on the device."""
        for rows in wanted:
            yield self.gather(rows)

    def gather(self, rows: Rows) -> Tensor:
        """See `MappedCopy.gather`; the tensor is on the device."""
        return self.at(self.places(rows))

    def places(self, rows: Rows) -> Tensor:
        """Where some rows are, int64 (n,) on the device: for `at`."""
        flat = torch.from_numpy(self._first[rows.shard] + rows.row * self._views[rows.shard] + rows.view)
        return to_device(flat, self._device)

    def at(self, places: Tensor) -> Tensor:
        """Features (n, ...) on the device; loads all of them at the first call."""
        if self._all is None:
            self._all = self._load()
        return self._all.index_select(0, places)

    def close(self) -> None:
        """See `MappedCopy.close`."""
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
