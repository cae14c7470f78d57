"""Reads and decodes lists of picture files, in this thread or ahead of it in other threads or processes.

Threads are for a CPU, which has little to decode in the time that a batch takes, and processes for a GPU.
Python lets one thread of a process run at a time, and a third of the work on a picture is Python: on 16 cores,
16 threads decoded twice as many pictures as one.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

import torch
import torch.multiprocessing  # tensors reach another process by shared memory
from torch import Tensor

from cvdist import log
from cvdist.data.contents import READERS, Contents, digest_of
from cvdist.data.images.decode import UndecodableError, decode_with_size, is_gpu_decodable
from cvdist.errors import UserError
from cvdist.hardware import usable_cores
from cvdist.log import redact

logger = logging.getLogger(__name__)

# Pictures a forward pass: enough for the device, few enough that memory is no question.
BATCH = {"cpu": 16, "cuda": 128}
_BATCHES_AHEAD = 2
# Pictures that a thread or process decodes at a time: a process' answer costs as much for one as for several.
_TASK = {"thread": 1, "process": 16}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, or the reason why it could not be decoded.

    Attributes:
        digest: 16 bytes of the file's SHA-256.
        pixels: uint8 (size, size, 3); None if it is not decoded.
        reason: why it can't be decoded; or empty.
        detail: the reason in the words of the decoder, for `--debug`.
        encoded: the file's content, where a GPU is to decode it (`cvdist.data.images.on_gpu`).
        width: width of the whole picture, upright, in pixels; 0 if it is not decoded.
        height: height of the whole picture, upright, in pixels; 0 if it is not decoded.
    """

    digest: bytes
    pixels: Tensor | None
    reason: str = ""
    detail: str = ""
    encoded: bytes | None = None
    width: int = 0
    height: int = 0


def stacked(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    """Join pictures of one size to a batch, where they are; in pinned memory if a GPU is to copy it."""
    if pixels[0].device.type != "cpu" or device.type == "cpu":
        return torch.stack(list(pixels))
    batch = torch.empty(len(pixels), *pixels[0].shape, dtype=pixels[0].dtype, pin_memory=True)
    return torch.stack(list(pixels), out=batch)


class Pictures(Protocol):
    """A source of decoded pictures."""

    def batches(self, paths: Sequence[str], size: int) -> Iterator[tuple[int, list[Decoded]]]:
        """Yield `size` decoded pictures at a time, with the position of the first one."""
        ...


class Reader:
    """Reads and decodes picture files below a folder or URI, one after the other, in this thread."""

    def __init__(self, root: str, size: int, resize: str, *, for_gpu: bool = False) -> None:
        """Prepare to read pictures below `root`, which are decoded as by `cvdist.data.images.decode.decode`.

        Args:
            root: folder or URI (`cvdist.data.forms.root_of`).
            size: height and width in pixels.
            resize: as `PicturesConfig.resize`.
            for_gpu: leave encoded what a GPU can decode.

        Raises:
            UserError: if the URI can't be understood.
        """
        self._root, self._size, self._resize, self._for_gpu = root, size, resize, for_gpu
        self._contents = Contents(root, patient=True)
        self._threads = 1 if self._contents.local else READERS

    def decode(self, paths: Sequence[str]) -> list[Decoded]:
        """Decode pictures.

        Args:
            paths: paths below the root; an empty one is the root itself.

        Raises:
            UserError: if a file can't be read.
        """
        found = [self._decode(content) for content in self._contents.read_all(paths, self._threads)]
        for path, one in zip(paths, found, strict=True):
            if one.detail:
                logger.debug("data       %s: %s (%s)", path, one.reason, one.detail)
        return found

    def pixels(self, paths: Sequence[str]) -> Tensor:
        """Decode pictures that could be decoded before, to uint8 (n, size, size, 3).

        Raises:
            UserError: if a file is gone or has changed to one that can't be decoded.
        """
        pixels = torch.empty(len(paths), self._size, self._size, 3, dtype=torch.uint8)
        for i, one in enumerate(self.decode(paths)):
            if one.pixels is None:
                raise UserError(
                    f"--data {redact(self._root)}: a picture has changed since the start, and can't be decoded "
                    f"any more ({one.reason}): start the job again"
                )
            pixels[i] = one.pixels
        return pixels

    def _decode(self, content: bytes) -> Decoded:
        digest = digest_of(content)
        if self._for_gpu and is_gpu_decodable(content, self._size):
            return Decoded(digest, None, encoded=content)
        return decoded(content, digest, self._size, self._resize)


class DecodeAhead:
    """Does a `Reader`'s work ahead, in threads or processes (`Pictures`). Several threads may use it."""

    def __init__(
        self,
        root: str,
        size: int,
        resize: str,
        *,
        threads: int,
        timeout: float,
        for_gpu: bool = False,
        processes: bool = False,
    ) -> None:
        """Set up the threads or processes, which start with the first task.

        Args:
            root: as in `Reader`.
            size: as in `Reader`.
            resize: as in `Reader`.
            threads: number of threads or processes that decode; 0: one for each core.
            timeout: seconds that a task may take.
            for_gpu: as in `Reader`.
            processes: whether to decode in processes rather than threads.

        Raises:
            UserError: if the URI can't be understood.
        """
        self._root, self._timeout = root, timeout
        self._reader = Reader(root, size, resize, for_gpu=for_gpu)
        self._count = threads or usable_cores()
        self._task = _TASK["process" if processes else "thread"]
        self._pool: Executor
        if processes:
            # Forked from a server without threads: a fork of this one could inherit a lock that nobody frees.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["cvdist.data.images.ahead"])
            values = (root, size, resize, for_gpu, dict(os.environ))
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_begin, initargs=values)
        else:
            self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="decode")

    def batches(self, paths: Sequence[str], size: int) -> Iterator[tuple[int, list[Decoded]]]:
        """Yield decoded batches, as `Pictures.batches` says, while the next ones are decoded.

        Raises:
            UserError: if a file can't be read, or takes too long.
        """
        starts = range(0, len(paths), size)
        tasks = (self.split(paths[start : start + size]) for start in starts)
        for start, parts in zip(starts, self.map(_decode, tasks), strict=True):
            yield start, [one for part in parts for one in part]

    def split(self, paths: Sequence[str]) -> list[Sequence[str]]:
        """Divide paths into tasks of a size that suits these threads or processes."""
        return [paths[i : i + self._task] for i in range(0, len(paths), self._task)]

    def map(self, function: Callable[[Reader, T], R], batches: Iterable[Sequence[T]]) -> Iterator[list[R]]:
        """Yield the list of `function(reader, task)` for each batch of tasks, in order, and work ahead.

        Raises:
            UserError: if the function raises it, or a task takes too long.
        """
        pending: deque[list[Future[R]]] = deque()
        try:
            for batch in batches:
                pending.append([self._submit(function, task) for task in batch])
                while len(pending) > _BATCHES_AHEAD and sum(map(len, pending)) > 2 * self._count:
                    yield self._taken(pending.popleft())
            while pending:
                yield self._taken(pending.popleft())
        finally:
            for future in (future for futures in pending for future in futures):
                future.cancel()

    def close(self) -> None:
        """End the threads or processes. Tasks that have not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, function: Callable[[Reader, T], R], task: T) -> Future[R]:
        if isinstance(self._pool, ProcessPoolExecutor):
            return self._pool.submit(_run_here, function, task)
        return self._pool.submit(function, self._reader, task)

    def _taken(self, futures: list[Future[R]]) -> list[R]:
        try:
            return [future.result(self._timeout) for future in futures]
        except TimeoutError:
            raise UserError(
                f"a picture took longer than {self._timeout:g} s to be read and decoded: raise --data-timeout, "
                f"or look at the storage of --data {redact(self._root)}"
            ) from None
        except BrokenProcessPool as error:
            raise UserError(
                "a process that decodes pictures has died: is there memory left, and is /dev/shm large enough? "
                "Lower --decode-workers, or enlarge it"
            ) from error


def decoded(content: bytes, digest: bytes, size: int, resize: str) -> Decoded:
    """Decode a file, or say why it can't be decoded."""
    try:
        pixels, (width, height) = decode_with_size(content, size, resize)
        return Decoded(digest, pixels, width=width, height=height)
    except UndecodableError as error:
        return Decoded(digest, None, str(error), error.detail)


_reader_here: Reader | None = None


def _begin(root: str, size: int, resize: str, for_gpu: bool, environment: dict[str, str]) -> None:
    """Set up a decoding process: it computes in one thread, and ends with the process that it works for."""
    global _reader_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the job may have to save first
    os.environ.update(environment)  # credentials as they are now: the server may have older ones
    torch.set_num_threads(1)
    log.setup()
    _reader_here = Reader(root, size, resize, for_gpu=for_gpu)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: Any) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), name="watch", daemon=True).start()


def _run_here(function: Callable[[Reader, T], R], task: T) -> R:
    """Call a function with this decoding process's reader."""
    assert _reader_here is not None
    return function(_reader_here, task)


def _decode(reader: Reader, paths: Sequence[str]) -> list[Decoded]:
    """Decode pictures. The pixels of several lie in one piece of memory, which processes can share."""
    found = reader.decode(paths)
    pixels = [one.pixels for one in found if one.pixels is not None]
    if len(pixels) < 2:
        return found
    rows = iter(torch.stack(pixels))
    return [dataclasses.replace(one, pixels=next(rows)) if one.pixels is not None else one for one in found]
