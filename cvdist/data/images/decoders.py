"""Reading and decoding of pictures in worker processes of PyTorch's DataLoader."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cvdist import storage
from cvdist.data.images.decode import UndecodableError, decode
from cvdist.errors import UserError
from cvdist.log import redact

Rows = Sequence[int] | np.ndarray

_READERS = 16  # requests at a time and process, where the files are not on a disk


class PictureFiles:
    """The contents of pictures by row of a table with a column `path`. Pickles small, opens late."""

    def __init__(self, uri: str, table: Path) -> None:
        """`table`: an Arrow file, which is memory-mapped."""
        self.uri, self.table = uri, table
        self._opened: tuple[Any, str, Any, ThreadPoolExecutor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def read(self, rows: Rows) -> Iterator[bytes]:
        """One after another, while the next ones are on their way.

        Raises:
            UserError: for a file that is gone or can't be read.
        """
        filesystem, root, paths, pool = self._open()

        def one(row: int) -> bytes:
            path = paths[row].as_py()
            try:
                return storage.read(filesystem, f"{root}/{path}")
            except OSError as error:
                raise UserError(
                    f"--data {redact(self.uri)}: {path} can't be read ({storage.reason(error)})"
                ) from error

        yield from map(one, rows) if pool is None else pool.map(one, rows)

    def _open(self) -> tuple[Any, str, Any, ThreadPoolExecutor | None]:
        if self._opened is None:
            filesystem, root = storage.locate(self.uri, "--data")
            with pa.memory_map(str(self.table)) as source:
                paths = pa.ipc.open_file(source).read_all().column("path")
            local = isinstance(filesystem, pa.fs.LocalFileSystem)
            self._opened = (filesystem, root, paths, None if local else ThreadPoolExecutor(_READERS))
        return self._opened


@dataclass
class CheckedChunk:
    """The result of checking some pictures: their pixels, or why they can't be decoded.

    digests: 16 bytes each (n,); moments: float32 (n, 6), means and means of squares by channel; bad: (position,
    reason); unreadable: why one could not even be read, or empty.
    """

    digests: np.ndarray
    moments: np.ndarray
    bad: list[tuple[int, str]]
    unreadable: str = ""


class CheckDataset(Dataset[CheckedChunk]):
    """Decodes rows, and writes their pixels into a file if there is one."""

    def __init__(self, uri: str, table: Path, size: int, resize: str, pixels: Path | None) -> None:
        """`pixels`: uint8 (rows of the table, size, size, 3)."""
        self.files, self.size, self.resize, self.pixels = PictureFiles(uri, table), size, resize, pixels

    def __getitem__(self, rows: Rows) -> CheckedChunk:
        """Check some rows."""
        checked = CheckedChunk(np.zeros(len(rows), "S16").view("V16"), np.zeros((len(rows), 6), np.float32), [])
        target = os.open(self.pixels, os.O_WRONLY) if self.pixels else None
        try:
            for i, (row, content) in enumerate(zip(rows, self.files.read(rows), strict=True)):
                checked.digests[i] = hashlib.sha256(content).digest()[:16]
                try:
                    pixels = decode(content, self.size, self.resize)
                except UndecodableError as error:
                    checked.bad.append((i, str(error)))
                    continue
                values = pixels.view(-1, 3).to(torch.float32).div_(255)
                checked.moments[i] = torch.cat([values.mean(0), values.square().mean(0)]).numpy()
                if target is not None:
                    os.pwrite(target, pixels.numpy().data, row * pixels.numel())
        except UserError as error:
            checked.unreadable = str(error)
        finally:
            if target is not None:
                os.close(target)
        return checked


class DecodeDataset(Dataset[Tensor]):
    """Decodes rows to uint8 (n, size, size, 3)."""

    def __init__(self, uri: str, table: Path, size: int, resize: str) -> None:
        self.files, self.size, self.resize = PictureFiles(uri, table), size, resize

    def __getitem__(self, rows: Rows) -> Tensor:
        """Decode some rows.

        Raises:
            UserError: if a file is gone or has changed to one that can't be decoded.
        """
        pictures = torch.empty(len(rows), self.size, self.size, 3, dtype=torch.uint8)
        for i, content in enumerate(self.files.read(rows)):
            try:
                pictures[i] = decode(content, self.size, self.resize)
            except UndecodableError as error:
                raise UserError(
                    f"--data {redact(self.files.uri)}: a picture has changed since the start, and can't be "
                    f"decoded any more ({error}): start the job again"
                ) from error
        return pictures


class _Queue:
    """A sampler whose batches can be replaced, so that the DataLoader's processes are kept between epochs."""

    def __init__(self) -> None:
        self.rows: Iterable[Rows] = ()

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.rows)


class DecodingSource:
    """Decodes pictures each time they are used, in worker processes that work ahead (`PixelSource`)."""

    def __init__(self, task: DecodeDataset, processes: int, timeout: float, *, pinned: bool) -> None:
        """Set up the worker processes, which start with the first epoch.

        Args:
            task: reads and decodes a batch.
            processes: number of worker processes; 0 means that this process decodes.
            timeout: seconds that a batch may take.
            pinned: whether batches are put into pinned memory, for copies to a GPU.
        """
        self._task, self._timeout = task, timeout
        self._queue = _Queue()
        self._loader = DataLoader(
            task,
            sampler=self._queue,
            persistent_workers=True,
            pin_memory=pinned,
            **worker_options(processes, timeout),
        )

    def batches(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        """Yield the pixels of each list of rows in order, uint8 (n, size, size, 3).

        Only one such iterator may be in use at a time.
        """
        self._queue.rows = rows
        with explain_loader_errors(self._timeout):
            yield from self._loader

    def pictures(self, rows: Rows) -> Tensor:
        """Decode some rows in this process, to uint8 (n, size, size, 3)."""
        return self._task[rows]


@contextmanager
def explain_loader_errors(timeout: float) -> Iterator[None]:
    """Words for what a DataLoader raises: that it waited too long, or that /dev/shm is full."""
    try:
        yield
    except RuntimeError as error:
        if "Bus error" in str(error) or "shared memory" in str(error):
            free = shutil.disk_usage("/dev/shm").total / 2**20
            raise UserError(
                f"/dev/shm, of {free:,.0f} MiB, is too small for what decoding processes hand over: enlarge "
                "it, lower --decode-workers, or give --cache the room to keep decoded pictures"
            ) from error
        if "timed out" not in str(error):
            raise
        raise UserError(
            f"pictures took longer than {timeout:g} s to be read and decoded: raise --data-timeout, or look at "
            "the storage that they come from"
        ) from error


def worker_options(processes: int, timeout: float) -> dict[str, Any]:
    """Return the arguments of a DataLoader whose worker processes each handle one list of rows at a time.

    Args:
        processes: number of worker processes; 0 means that this process does the work.
        timeout: seconds that a batch may take.
    """
    common = {"batch_size": None, "num_workers": processes, "collate_fn": _as_it_is}
    if not processes:
        return common
    # Forked from a server that has no threads: a fork of this process could inherit a lock that nobody frees.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cvdist.data.images.decoders"])
    return {
        **common,
        "multiprocessing_context": context,
        "timeout": timeout,
        "prefetch_factor": 2,
        "worker_init_fn": partial(_share_environment, dict(os.environ)),
        # Its own, or starting an epoch would draw from the stream that dropout is drawn from.
        "generator": torch.Generator(),
    }


def _share_environment(environment: dict[str, str], worker: int) -> None:
    """Set the current environment variables in a worker process.

    The fork server keeps those of its own start, which may lack newer credentials and endpoints.
    """
    os.environ.update(environment)


def _as_it_is(item: Any) -> Any:
    return item
