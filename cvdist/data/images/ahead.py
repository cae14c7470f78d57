"""Pictures decoded by threads while the device computes: for jobs that see each picture once."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from cvdist import storage
from cvdist.data.images.decode import UndecodableError, decode, is_for_gpu
from cvdist.errors import UserError
from cvdist.hardware import usable_cores
from cvdist.log import redact

# Pictures a forward pass: enough for the device, few enough that memory is no question.
BATCH = {"cpu": 16, "cuda": 128}
_BATCHES_AHEAD = 2
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
    """What identifies a picture's file, besides its size."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


class DecodeAhead:
    """Reads and decodes files below a folder or URI. Safe to use from several threads."""

    def __init__(
        self, uri: str, size: int, resize: str, *, threads: int, timeout: float, for_gpu: bool = False
    ) -> None:
        """`threads`: 0: one a core; `timeout`: seconds that a batch may take; `for_gpu`: leave encoded what a
        GPU can decode.

        Raises:
            UserError: if the URI can't be understood.
        """
        self._uri, self._size, self._resize, self._timeout = uri, size, resize, timeout
        self._for_gpu = for_gpu
        self._pool = ThreadPoolExecutor(threads or usable_cores(), thread_name_prefix="decode")
        self._source = storage.locate(uri, "--data", patient=True)

    def batches(self, paths: Sequence[str], size: int) -> Iterator[tuple[int, list[Decoded]]]:
        """`size` pictures at a time, with the position of the first one.

        Raises:
            UserError: if a file can't be read, or takes too long.
        """
        pending: deque[tuple[int, list[Future[Decoded]]]] = deque()
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            pending.append((start, [self._pool.submit(self._decode, path) for path in batch]))
            if len(pending) > _BATCHES_AHEAD:
                yield self._taken(*pending.popleft())
        while pending:
            yield self._taken(*pending.popleft())

    def _taken(self, start: int, futures: list[Future[Decoded]]) -> tuple[int, list[Decoded]]:
        try:
            return start, [future.result(self._timeout) for future in futures]
        except TimeoutError:
            raise UserError(
                f"a picture took longer than {self._timeout:g} s to be read and decoded: raise --data-timeout, "
                f"or look at the storage of --data {redact(self._uri)}"
            ) from None

    def _decode(self, path: str) -> Decoded:
        filesystem, root = self._source
        try:
            content = storage.read(filesystem, f"{root}/{path}")
        except OSError as error:
            raise UserError(
                f"--data {redact(self._uri)}: {path} can't be read ({storage.reason(error)})"
            ) from error
        digest = digest_of(content)
        if self._for_gpu and is_for_gpu(content, self._size):
            return Decoded(digest, None, encoded=content)
        try:
            return Decoded(digest, decode(content, self._size, self._resize))
        except UndecodableError as error:
            return Decoded(digest, None, str(error))
