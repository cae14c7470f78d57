"""Applies a function to a listing of pictures, in work units that are computed once even if the job is killed.

A finished work unit leaves a result file, which is named by its contents and never changes, and then a receipt.
The same command again computes only units without a receipt. The manifest is written last and replaced whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cvdist import log
from cvdist.data.formats import became_readable
from cvdist.data.quarantine import QUARANTINE, BadPicture, quarantine_csv, require_few_bad
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_READERS = 16  # receipts at a time
_ROUNDS = 3  # in which files that somebody deletes meanwhile are computed again


@dataclass(frozen=True)
class WorkUnit:
    """The pictures of one result file: the unit of work, of retry and of resumption.

    Attributes:
        key: Hash of the pictures' identity and of everything else that their results depend on.
        pictures: The pictures' part of the listing, as lists by column, such as path, size and version.
    """

    key: str
    pictures: dict[str, list[Any]]

    @property
    def paths(self) -> list[str]:
        """Paths of the pictures."""
        return self.pictures["path"]


@dataclass(frozen=True)
class UnitResult:
    """The result of a work unit.

    Attributes:
        content: Content of the result file; None if there is nothing to store.
        bad: The pictures that can't be decoded.
        values: Plain values for the receipt, from which the manifest is made.
    """

    content: bytes | None
    bad: Sequence[BadPicture]
    values: dict[str, Any]


@dataclass(frozen=True)
class Receipt:
    """The record of a finished work unit.

    Attributes:
        key: Key of the work unit.
        object: Path of the result file below the folder; empty without one.
        size: Bytes of the result file.
        pictures: Number of pictures in the unit.
        bad: Pictures that can't be decoded.
        values: Values that the function has noted.
    """

    key: str
    object: str
    size: int
    pictures: int
    bad: tuple[BadPicture, ...]
    values: dict[str, Any]

    def to_json(self) -> bytes:
        """Write the receipt as JSON that contains its own checksum."""
        return with_checksum(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> Receipt:
        """Read a receipt that `to_json` wrote.

        Raises:
            ValueError: If the content is damaged, or something else.
        """
        try:
            values = json.loads(content)
            if values.pop("sha256") != checksum(values):
                raise ValueError("its checksum is not that of its contents")
            return cls(**{**values, "bad": tuple(BadPicture(**picture) for picture in values["bad"])})
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("it is not a receipt") from error


@dataclass(frozen=True)
class ResultStore:
    """A folder of result files and receipts. It can be sent to another process, which opens the folder itself.

    Attributes:
        folder: The folder.
        place: Name of the folder in it that holds the result files.
        suffix: Suffix of the result files' names.
    """

    folder: Folder
    place: str
    suffix: str

    @classmethod
    def open(cls, uri: str, flag: str, place: str, suffix: str) -> ResultStore:
        """Open the folder at `uri`, which the user gave with `flag`. Requests are retried, for long jobs."""
        return cls(Folder.open(uri, flag, patient=True), place, suffix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the names, because the other process opens its own connection to the storage."""
        return ResultStore.open, (self.folder.uri, self.folder.flag, self.place, self.suffix)

    def find(self, key: str) -> Receipt | None:
        """Return the receipt of a work unit whose result file is stored in its full size, or None.

        It also returns None if pictures were bad because a package was missing that is installed now.

        Raises:
            UserError: If the storage can't be read.
        """
        content = self.folder.find(_receipt_name(key))
        try:
            receipt = Receipt.from_json(content or b"")
        except ValueError:
            return None
        if receipt.key != key or (receipt.object and self.folder.size(receipt.object) != receipt.size):
            return None
        if any(became_readable(picture.reason) for picture in receipt.bad):
            return None
        return receipt

    def process(self, function: Callable[[WorkUnit], UnitResult], unit: WorkUnit) -> Receipt:
        """Compute and store a work unit, unless it is stored already.

        Raises:
            UserError: If `function` raises it, or the folder can't be read or written.
        """
        receipt = self.find(unit.key)
        if receipt is not None:  # by an actor that died right after, or by another job
            return receipt
        result = function(unit)
        name, content = "", result.content or b""
        if result.content is not None:
            # Named by its contents too: two jobs that compute the same unit can't spoil each other's.
            name = f"{self.place}/{unit.key}-{hashlib.sha256(content).hexdigest()[:16]}{self.suffix}"
            self.folder.write(name, content)
        bad = tuple(result.bad)
        receipt = Receipt(unit.key, name, len(content), len(unit.paths), bad, result.values)
        self.folder.write(_receipt_name(unit.key), receipt.to_json())
        return receipt

    def plan(self, units: Sequence[WorkUnit], files: Mapping[str, int]) -> MapPlan:
        """Find out which units are finished. `files`: sizes of the folder's files by name (`Folder.sizes`)."""
        listed = [unit.key for unit in units if _receipt_name(unit.key) in files]
        with ThreadPoolExecutor(_READERS) as pool:
            receipts = [receipt for receipt in pool.map(self.find, listed) if receipt is not None]
        return MapPlan(self, tuple(units), {one.key: one for one in receipts}, frozenset(files))

    def publish(self, manifest: bytes, bad: Sequence[BadPicture]) -> None:
        """Write the quarantine and then the manifest, which makes the results valid."""
        self.folder.write(QUARANTINE, quarantine_csv(bad).encode())
        self.folder.write(MANIFEST, manifest)


@dataclass(frozen=True)
class MapPlan:
    """The work that is to be done.

    Attributes:
        store: Folder of the results.
        units: All work units.
        done: Receipts of the units that earlier jobs have finished, by key.
        files: Names of all files that were in the folder.
    """

    store: ResultStore
    units: tuple[WorkUnit, ...]
    done: dict[str, Receipt]
    files: frozenset[str] = frozenset()

    @property
    def left(self) -> list[WorkUnit]:
        """Work units that have to be computed."""
        return [unit for unit in self.units if unit.key not in self.done]

    def remove_stale(self, receipts: Iterable[Receipt]) -> int:
        """Delete result files and receipts that were there before this job and do not belong to `receipts`.

        Files with other kinds of names are kept, and so are those of jobs that run at the same time.

        Returns:
            The number of result files that were deleted.

        Raises:
            UserError: If a file can't be deleted.
        """
        place, suffix = self.store.place, re.escape(self.store.suffix)
        ours = re.compile(rf"{place}/[0-9a-f]{{32}}-[0-9a-f]{{16}}{suffix}|{_receipt_name('[0-9a-f]{32}')}")
        used = {name for receipt in receipts for name in (receipt.object, _receipt_name(receipt.key))}
        stale = [name for name in self.files - used if ours.fullmatch(name)]
        for name in stale:
            try:
                self.store.folder.delete(name)
            except UserError:
                if self.store.folder.size(name) is not None:  # else another job was faster
                    raise
        return sum(name.startswith(f"{place}/") for name in stale)


Compute = Callable[[Sequence[WorkUnit], ResultStore], Iterator[Receipt | None]]
"""Processes work units in any order, by `ResultStore.process`. None now and then, while nothing is finished."""


@dataclass(frozen=True)
class MapResult:
    """A finished map.

    Attributes:
        receipts: Receipts of all units, in their order.
        bad: All pictures that can't be decoded, sorted by path.
        computed: Number of pictures that this job has computed.
        seconds: Time that it took to compute them.
    """

    receipts: tuple[Receipt, ...]
    bad: tuple[BadPicture, ...]
    computed: int
    seconds: float


def run(
    plan: MapPlan,
    compute: Compute,
    *,
    noun: str,
    data: str,
    pictures: int,
    max_bad_fraction: float,
    known_bad: Sequence[BadPicture] = (),
) -> MapResult:
    """Compute the work units of a plan that are left.

    Args:
        plan: What has to be done.
        compute: Computes work units.
        noun: What a work unit is called in messages, such as "shards".
        data: The URI of the pictures, for messages.
        pictures: Number of pictures in the listing.
        max_bad_fraction: Largest part of them that may be bad.
        known_bad: Pictures that are known to be bad, and are in no work unit.

    Raises:
        UserError: If `compute` raises it, too many pictures are bad, or others keep deleting the results.
    """
    store, done = plan.store, dict(plan.done)
    bad = {one.path: one for one in (*known_bad, *(one for receipt in done.values() for one in receipt.bad))}

    def require_few() -> None:
        require_few_bad(list(bad.values()), pictures=pictures, fraction=max_bad_fraction, uri=data)

    require_few()
    total = sum(len(unit.paths) for unit in plan.units)
    computed = rounds = 0
    began, line = time.monotonic(), log.ProgressLine(logger, enabled=True)
    while left := [unit for unit in plan.units if unit.key not in done]:
        rounds += 1
        if rounds > _ROUNDS:
            raise UserError(
                f"{store.folder.flag} {redact(store.folder.uri)}: finished {noun} are deleted while this job "
                "runs: end what deletes them, and run the same command again"
            )
        for receipt in compute(left, store):
            if receipt is not None:
                done[receipt.key] = receipt
                computed += receipt.pictures
                bad |= {one.path: one for one in receipt.bad}
                require_few()
            if line.due():
                finished = sum(one.pictures for one in done.values())
                rate = computed / (time.monotonic() - began)
                left_for = log.duration((total - finished) / rate) if rate else ""
                line.show(
                    f"{finished:,}/{total:,} pictures, {len(done)}/{len(plan.units)} {noun}, "
                    f"{rate:,.1f} images/s, {f'about {left_for} left' if rate else 'the first ones'}"
                )
        # Another job for this folder that has ended in the meantime may have deleted what it does not need.
        files = {"": 0, **store.folder.sizes()}
        done = {
            key: receipt
            for key, receipt in done.items()
            if files.get(receipt.object) == receipt.size and _receipt_name(key) in files
        }
    line.clear()
    receipts = tuple(done[unit.key] for unit in plan.units)
    return MapResult(receipts, tuple(bad[path] for path in sorted(bad)), computed, time.monotonic() - began)


def work_units(
    listing: pa.Table, identity: Mapping[str, object], bounds: Iterable[tuple[int, int]]
) -> list[WorkUnit]:
    """Cut a listing into work units.

    Args:
        listing: Table of pictures with a column path. All columns are part of the units' keys.
        identity: Everything else that the results depend on.
        bounds: First row, and row after the last one, of each unit (`equal_bounds`, `stable_bounds`).
    """
    units = []
    for start, stop in bounds:
        pictures = listing.slice(start, stop - start).to_pydict()
        text = json.dumps({**identity, "pictures": pictures}, sort_keys=True)
        units.append(WorkUnit(hashlib.sha256(text.encode()).hexdigest()[:32], pictures))
    return units


def equal_bounds(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut `count` rows into units of `size` rows, the last of which may be smaller."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


def stable_bounds(paths: Sequence[str], size: int) -> Iterator[tuple[int, int]]:
    """Cut sorted paths into units of about `size`, at most twice as many.

    Hashes of the paths decide where units end, so a picture that is added or removed changes its own unit and
    not all that follow (content-defined chunking: Muthitacharoen, Chen and Mazieres 2001, "A Low-bandwidth
    Network File System").
    """
    start, half = 0, max(1, size // 2)
    for i, path in enumerate(paths):
        if i - start < half:
            continue
        digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
        if i - start >= 2 * size or int.from_bytes(digest) % half == 0:
            yield start, i
            start = i
    if start < len(paths):
        yield start, len(paths)


def _receipt_name(key: str) -> str:
    return f"receipts/{key}.json"


def with_checksum(values: dict[str, Any], indent: int | None = None) -> bytes:
    """Write values as a JSON object with their checksum as `sha256`."""
    return json.dumps({"sha256": checksum(values), **values}, indent=indent).encode()


def checksum(values: dict[str, Any]) -> str:
    """Return the SHA-256 of values as JSON with sorted keys, so that their order does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
