"""Pictures decoded while the device computes: for jobs that see each picture once.

By threads for a CPU, which has little to decode in the time that a batch takes; by processes for a GPU. Python
lets one thread of a process run at a time, and a third of the work on a picture is Python: on 16 cores, 16
threads decoded twice as many pictures as one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch
import torch.multiprocessing  # tensors reach another process by shared memory
from torch import Tensor

from cvdist import storage
from cvdist.data.images.decode import UndecodableError, decode, is_gpu_decodable
from cvdist.errors import UserError
from cvdist.hardware import usable_cores
from cvdist.log import redact

# Pictures a forward pass: enough for the device, few enough that memory is no question.
BATCH = {"cpu": 16, "cuda": 128}
_BATCHES_AHEAD = 2
# Pictures that a thread or process decodes at a time: a process' answer costs as much for one as for several.
_TASK = {"thread": 1, "process": 16}
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Decoded:
    """digest: 16 bytes of the file's SHA-256; pixels: uint8 (size, size, 3), or None with the reason.

    encoded: the file's content instead, where a GPU is to decode it (`cvdist.data.images.on_gpu`).
    """

    digest: bytes
    pixels: Tensor | None
    reason: str = ""
    encoded: bytes | None = None


def digest_of(content: bytes) -> bytes:
    """Return the first 16 bytes of a file's SHA-256, which identify its content."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def stacked(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    """Pictures of one size as a batch, where they are; for a GPU in memory that it copies from by itself."""
    if pixels[0].device.type != "cpu" or device.type == "cpu":
        return torch.stack(list(pixels))
    batch = torch.empty(len(pixels), *pixels[0].shape, dtype=pixels[0].dtype, pin_memory=True)
    return torch.stack(list(pixels), out=batch)


class Pictures(Protocol):
    """A source of decoded pictures."""

    def batches(self, paths: Sequence[str], size: int) -> Iterator[tuple[int, list[Decoded]]]:
        """`size` pictures at a time, with the position of the first one."""
        ...


class DecodeAhead:
    """Reads and decodes files below a folder or URI (`Pictures`). Safe to use from several threads."""

    def __init__(
        self,
        uri: str,
        size: int,
        resize: str,
        *,
        threads: int,
        timeout: float,
        for_gpu: bool = False,
        processes: bool = False,
    ) -> None:
        """Of pictures below `uri`, as `cvdist.data.images.decode.decode` makes them.

        Args:
            uri: folder or URI.
            size: height and width in pixels.
            resize: as `DataConfig.resize`.
            threads: that decode, or processes; 0: one a core.
            timeout: seconds that a batch may take.
            for_gpu: leave encoded what a GPU can decode.
            processes: decode in processes of their own.

        Raises:
            UserError: if the URI can't be understood.
        """
        self._uri, self._timeout = uri, timeout
        self._reader = _Reader(uri, size, resize, for_gpu)
        count = threads or usable_cores()
        self._task = _TASK["process" if processes else "thread"]
        self._pool: Executor
        if processes:
            # Forked from a server without threads: a fork of this one could inherit a lock that nobody frees.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["cvdist.data.images.ahead"])
            values = (uri, size, resize, for_gpu, dict(os.environ))
            self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=values)
        else:
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="decode")

    def batches(self, paths: Sequence[str], size: int) -> Iterator[tuple[int, list[Decoded]]]:
        """Yield decoded batches, as `Pictures.batches` says, while processes decode the next ones.

        Raises:
            UserError: if a file can't be read, or takes too long.
        """
        pending: deque[tuple[int, list[Future[list[Decoded]]]]] = deque()
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            tasks = [list(batch[i : i + self._task]) for i in range(0, len(batch), self._task)]
            pending.append((start, [self._submit(task) for task in tasks]))
            if len(pending) > _BATCHES_AHEAD:
                yield self._taken(*pending.popleft())
        while pending:
            yield self._taken(*pending.popleft())

    def close(self) -> None:
        """End the threads or processes, without what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, paths: list[str]) -> Future[list[Decoded]]:
        if isinstance(self._pool, ProcessPoolExecutor):
            return self._pool.submit(_decode_here, paths)
        return self._pool.submit(self._reader.decode, paths)

    def _taken(self, start: int, futures: list[Future[list[Decoded]]]) -> tuple[int, list[Decoded]]:
        try:
            return start, [one for future in futures for one in future.result(self._timeout)]
        except TimeoutError:
            raise UserError(
                f"a picture took longer than {self._timeout:g} s to be read and decoded: raise --data-timeout, "
                f"or look at the storage of --data {redact(self._uri)}"
            ) from None
        except BrokenProcessPool as error:
            raise UserError(
                "a process that decodes pictures has died: is there memory left, and is /dev/shm large enough? "
                "Lower --decode-workers, or enlarge it"
            ) from error


class _Reader:
    """Reads and decodes files, in whatever thread or process."""

    def __init__(self, uri: str, size: int, resize: str, for_gpu: bool) -> None:
        self._uri, self._size, self._resize, self._for_gpu = uri, size, resize, for_gpu
        self._source = storage.locate(uri, "--data", patient=True)

    def decode(self, paths: Sequence[str]) -> list[Decoded]:
        """Decode the pictures one after the other, in this process.

        Raises:
            UserError: if a file can't be read.
        """
        return [self._decode(path) for path in paths]

    def _decode(self, path: str) -> Decoded:
        filesystem, root = self._source
        try:
            content = storage.read(filesystem, f"{root}/{path}")
        except OSError as error:
            raise UserError(
                f"--data {redact(self._uri)}: {path} can't be read ({storage.reason(error)})"
            ) from error
        digest = digest_of(content)
        if self._for_gpu and is_gpu_decodable(content, self._size):
            return Decoded(digest, None, encoded=content)
        try:
            return Decoded(digest, decode(content, self._size, self._resize))
        except UndecodableError as error:
            return Decoded(digest, None, str(error))


_reader_here: _Reader | None = None


def _begin(uri: str, size: int, resize: str, for_gpu: bool, environment: dict[str, str]) -> None:
    """In each decoding process: one thread computes, and it ends with the process that it works for."""
    global _reader_here
    os.environ.update(environment)  # credentials as they are now: the server may have older ones
    torch.set_num_threads(1)
    _reader_here = _Reader(uri, size, resize, for_gpu)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: Any) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), name="watch", daemon=True).start()


def _decode_here(paths: list[str]) -> list[Decoded]:
    """In a decoding process: pictures whose pixels lie in one piece of shared memory."""
    assert _reader_here is not None
    decoded = _reader_here.decode(paths)
    pixels = [one.pixels for one in decoded if one.pixels is not None]
    if not pixels:
        return decoded
    rows = iter(torch.stack(pixels).share_memory_())
    return [dataclasses.replace(one, pixels=next(rows)) if one.pixels is not None else one for one in decoded]
