"""A node's decoded copy of an image folder, for which every picture is decoded once, at the start of a job.

`prepare` decodes all pictures in worker processes. This finds the pictures that can't be decoded, and the
digests and channel means of the others. If the disk has room, the pixels are written to one file, from which
each epoch reads them. In the cache folder, `KEY/` holds

    index.arrow     the good pictures by content: path, label (and classes, see `cvdist.data.labels`), part, row
                    in the pixel file, digest, moments
    quarantine.csv  the bad pictures, with reasons
    pixels.u8       uint8 (rows, size, size, 3), absent if the disk has no room for it
    meta.json       written last

where KEY is a hash of the listing (paths and contents) and of the settings that the pixels depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cvdist import log, storage
from cvdist.config import DataConfig, TableConfig, part_of
from cvdist.data.contents import DIGEST_BYTES
from cvdist.data.formats import became_readable
from cvdist.data.forms import root_of
from cvdist.data.images import versions
from cvdist.data.images.ahead import DecodeAhead, Reader
from cvdist.data.images.decode import decode_settings
from cvdist.data.images.listing import Listing, list_pictures
from cvdist.data.labels import CLASSES
from cvdist.data.quarantine import QUARANTINE, BadPicture, parse_quarantine, quarantine_csv, require_few_bad
from cvdist.errors import UserError
from cvdist.hardware import usable_cores
from cvdist.lock import locked
from cvdist.log import redact

logger = logging.getLogger(__name__)

_FORMAT = 2
_CHUNK = 32  # pictures that a process decodes at a time
_INDEX, _PIXELS, _META = "index.arrow", "pixels.u8", "meta.json"


@dataclass(frozen=True)
class PictureStore:
    """The decoded pictures that `prepare` has written on this node.

    Attributes:
        table: the good pictures, memory-mapped: the columns of `Listing` and row (int64, in the pixel file),
            digest (16 bytes of SHA-256), moments (6 float32: means of the three channels in [0, 1], means of
            their squares).
        pixels: path of the pixel file, or None.
    """

    classes: tuple[str, ...]
    table: pa.Table
    bad: list[BadPicture]
    pixels: Path | None


def prepare(config: DataConfig, cache: Path, *, timeout: float, data_timeout: float) -> None:
    """Make this node's decoded copy of the pictures, unless it is there already.

    Args:
        config: configuration that names the pictures.
        cache: the node's cache folder.
        timeout: seconds to wait for another process that is doing the same.
        data_timeout: seconds that a chunk of pictures may take.

    Raises:
        UserError: if the pictures can't be listed or read, or too many can't be decoded.
    """
    listing = list_pictures(config)
    pictures = versions.digest(versions.with_versions(listing.table, root_of(config), cache))
    identity = {"format": _FORMAT, "classes": listing.classes, "listing": pictures, **decode_settings(config)}
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), f"decode {redact(config.uri)}", timeout):
            if _outdated(folder, config, len(listing.table)):
                _build(folder, listing, config, data_timeout)
            storage.write_here(_pointer(config, cache), folder.name.encode())
    except (OSError, TimeoutError) as error:
        raise UserError(
            f"--cache {cache} can't be used ({storage.reason(error)}): name another folder with --cache or "
            "CVDIST_CACHE"
        ) from error
    _require_few_bad(folder, config)


def open_picture_store(config: DataConfig, cache: Path) -> PictureStore:
    """Open the decoded pictures that `prepare` has written.

    Raises:
        UserError: if it did not run on this node, or its files are gone.
    """
    try:
        folder = cache / _pointer(config, cache).read_text()
        meta = json.loads((folder / _META).read_text())
        with pa.memory_map(str(folder / _INDEX)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"--cache {cache} has lost its copy of {redact(config.uri)}: start again") from error
    pixels = folder / _PIXELS
    bad = _read_bad(folder)
    return PictureStore(tuple(meta["classes"]), table, bad, pixels if meta["pixels"] else None)


def _pointer(config: DataConfig, cache: Path) -> Path:
    """Return the path of the file that names the folder of the newest copy, so that workers need no listing."""
    named = {"data": config.uri, **vars(part_of(TableConfig, config))}
    identity = json.dumps(named | decode_settings(config))
    return cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.current"


def _outdated(folder: Path, config: DataConfig, pictures: int) -> bool:
    try:
        meta = json.loads((folder / _META).read_text())
    except (OSError, ValueError):
        return True
    if any(became_readable(one.reason) for one in _read_bad(folder)):
        return True
    # Without pixels because the disk was full, and now it is not.
    return not meta["pixels"] and _room_for(pictures, config, folder.parent)


def _room_for(pictures: int, config: DataConfig, cache: Path) -> bool:
    return _bytes(pictures, config) <= config.cache_fraction * shutil.disk_usage(cache).free


def _bytes(pictures: int, config: DataConfig) -> int:
    return pictures * config.image_size**2 * 3


def _build(folder: Path, listing: Listing, config: DataConfig, data_timeout: float) -> None:
    """Decode all pictures into a temporary folder, then rename it to `folder`."""
    building = folder.with_name(f".{folder.name}.building")
    for old in (building, folder):
        shutil.rmtree(old, ignore_errors=True)
    building.mkdir()
    count = len(listing.table)
    pixels = _reserve(building / _PIXELS, count, config)
    rows, bad, columns = [], [], []
    for first, checked in check_all(listing.table.column("path"), config, pixels, data_timeout):
        bad += [(first + i, why) for i, why in checked.bad]
        excluded = {i for i, _ in checked.bad}
        good = [i for i in range(len(checked.digests)) if i not in excluded]
        rows.append(np.array(good, dtype=np.int64) + first)
        columns.append((checked.digests[good], checked.moments[good]))
    kept = np.concatenate(rows)
    digests, moments = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    listed = [name for name in ("path", "label", "part", CLASSES) if name in listing.table.column_names]
    table = listing.table.select(listed).take(pa.array(kept))
    table = table.append_column("row", pa.array(kept))
    table = table.append_column("digest", _fixed(digests.view(np.uint8).reshape(len(kept), 16)))
    table = table.append_column("moments", pa.FixedSizeListArray.from_arrays(pa.array(moments.ravel()), 6))
    write_table(building / _INDEX, versions.by_content(table))
    paths = listing.table.column("path")
    table_of_bad = quarantine_csv([BadPicture(paths[row].as_py(), why) for row, why in bad])
    (building / QUARANTINE).write_bytes(table_of_bad.encode())
    meta = {"classes": listing.classes, "pictures": count, "pixels": pixels is not None}
    (building / _META).write_text(json.dumps(meta, indent=1))
    building.rename(folder)


def _reserve(path: Path, pictures: int, config: DataConfig) -> Path | None:
    """Create the pixel file in its full size, or return None if the disk has no room for it."""
    size = _bytes(pictures, config)
    if _room_for(pictures, config, path.parent):
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            return path
        except OSError:  # another process was faster
            path.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    logger.warning(
        "data       decoded pictures would take %.1f GB, %s has %.1f GB free (--cache-fraction %g): they are "
        "decoded again in each epoch",
        size / 1e9,
        path.parent.parent,
        free / 1e9,
        config.cache_fraction,
    )
    return None


@dataclass
class CheckedChunk:
    """The results of checking some pictures.

    Attributes:
        digests: 16 bytes for each picture (n,).
        moments: float32 (n, 6), means and means of squares by channel.
        bad: position and reason for each picture that can't be decoded.
    """

    digests: np.ndarray
    moments: np.ndarray
    bad: list[tuple[int, str]]


def check_all(
    paths: pa.ChunkedArray, config: DataConfig, pixels: Path | None, data_timeout: float
) -> Iterator[tuple[int, CheckedChunk]]:
    """Check all pictures and log the progress.

    Args:
        paths: paths of the pictures below `--data`.
        config: configuration that names the pictures.
        pixels: file for uint8 (pictures, size, size, 3), or None to keep none.
        data_timeout: seconds that a chunk of pictures may take.

    Yields:
        The first row and the result of each chunk, in order.
    """
    count = len(paths)
    starts = range(0, count, _CHUNK)
    processes = min(config.decode_workers or usable_cores(), len(starts))
    ahead = DecodeAhead(
        root_of(config),
        config.image_size,
        config.resize,
        threads=processes,
        timeout=data_timeout,
        processes=len(starts) > 1,  # or they would take longer to start
    )
    line = log.ProgressLine(logger, enabled=True)
    into = f" into {pixels.parent.parent}" if pixels else ""
    logger.info("data       decoding %s pictures once%s, %d processes", f"{count:,}", into, processes)
    began = first = time.monotonic()
    done = 0
    chunks = ([(start, paths[start : start + _CHUNK].to_pylist())] for start in starts)
    try:
        for start, (checked,) in zip(starts, ahead.map(partial(_check, pixels=pixels), chunks), strict=True):
            yield start, checked
            if not done:
                first = time.monotonic()  # the processes have started
            done = min(start + _CHUNK, count)
            if line.due() and time.monotonic() > first + 1:
                rate = (done - _CHUNK) / (time.monotonic() - first)
                line.show(
                    f"decoding {done:,}/{count:,} pictures, {rate:,.0f} a second, about "
                    f"{log.duration((count - done) / rate)} left"
                )
    finally:
        ahead.close()
    line.clear()
    logger.info("data       decoded %s pictures in %s", f"{done:,}", log.duration(time.monotonic() - began))


def _check(reader: Reader, chunk: tuple[int, list[str]], pixels: Path | None) -> CheckedChunk:
    """Decode pictures, and write their pixels into a file if there is one. `chunk`: first row, paths."""
    row, paths = chunk
    checked = CheckedChunk(
        np.zeros(len(paths), f"S{DIGEST_BYTES}").view(f"V{DIGEST_BYTES}"),
        np.zeros((len(paths), 6), np.float32),
        [],
    )
    with pixels.open("r+b", buffering=0) if pixels else nullcontext() as target:
        for i, one in enumerate(reader.decode(paths)):
            checked.digests[i] = one.digest
            if one.pixels is None:
                checked.bad.append((i, one.reason))
                continue
            values = one.pixels.view(-1, 3).to(torch.float32).div_(255)
            checked.moments[i] = torch.cat([values.mean(0), values.square().mean(0)]).numpy()
            if target is not None:
                os.pwrite(target.fileno(), one.pixels.numpy().data, (row + i) * one.pixels.numel())
    return checked


def _require_few_bad(folder: Path, config: DataConfig) -> None:
    """Refuse a data set with too many bad pictures, or log which ones are left out."""
    bad, listed = _read_bad(folder), folder / QUARANTINE
    if not bad:
        return
    pictures = json.loads((folder / _META).read_text())["pictures"]
    require_few_bad(bad, pictures=pictures, fraction=config.max_bad_fraction, uri=config.uri, listed=listed)
    logger.warning(
        "data       left out: %d of %d pictures (%.2f%%), which can't be decoded, e.g. %s (%s)",
        len(bad),
        pictures,
        100 * len(bad) / pictures,
        bad[0].path,
        bad[0].reason,
    )


# ------------------------------------------------------------------------------------------------------- files


def _fixed(values: np.ndarray) -> pa.Array:
    """Convert uint8 (n, k) to an Arrow array of n binary values of k bytes."""
    kind = pa.binary(values.shape[1])
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _read_bad(folder: Path) -> list[BadPicture]:
    return parse_quarantine((folder / QUARANTINE).read_bytes().decode())
