"""A batch prediction from its plan to its manifest. How the model is run is up to the caller."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cvdist import log, storage
from cvdist.config import InferenceConfig, PredictConfig
from cvdist.data.images.decode import FORMAT as DECODER
from cvdist.data.images.listing import list_unlabeled
from cvdist.data.quarantine import QUARANTINE, BadPicture, quarantine_csv, require_few_bad
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.prediction import plan, results
from cvdist.prediction.plan import WorkUnit
from cvdist.prediction.results import ResultFile
from cvdist.saved import SavedModel
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_READERS = 16  # files at a time

Compute = Callable[[Sequence[WorkUnit]], Iterator[ResultFile | None]]
"""Predicts slices, in any order; None now and then, while there is nothing new."""


@dataclass(frozen=True)
class PredictionPlan:
    """What is to be done. work: all slices, of which `done` has those that earlier jobs have finished."""

    identity: dict[str, Any]
    pictures: int
    work: list[WorkUnit]
    done: dict[str, ResultFile]

    @property
    def left(self) -> list[WorkUnit]:
        """The work units that have to be predicted."""
        return [work for work in self.work if results.name_of(work.key) not in self.done]


@dataclass(frozen=True)
class Predictions:
    """A finished prediction. computed: pictures of this job; seconds: that they took; removed: stale files."""

    parts: tuple[ResultFile, ...]
    bad: tuple[BadPicture, ...]
    counts: dict[str, int]
    computed: int
    seconds: float
    removed: int

    @property
    def rows(self) -> int:
        """Pictures that have a prediction."""
        return sum(part.rows for part in self.parts)


def resolved(inference: InferenceConfig, saved: SavedModel) -> InferenceConfig:
    """`inference` with what it leaves to the model's run.

    Raises:
        UserError: if the model can't classify pictures.
    """
    saved.require_classifier()
    shape = saved.identity
    if shape.height != shape.width or shape.channels not in (1, 3):
        raise UserError(
            f"{saved.source} takes {shape}: only square pictures, gray or in color, can be classified"
        )
    learned = saved.data.resize if saved.data is not None and saved.data.dataset == "images" else "squash"
    chosen = inference.precision if inference.precision != "auto" else saved.precision
    return replace(inference, resize=inference.resize or learned, precision=chosen)


def identity_of(config: PredictConfig, saved: SavedModel) -> dict[str, Any]:
    """Everything that the predictions of a given picture depend on."""
    return {
        "model": saved.digest,
        # Without its head, which the digest tells apart: results of older versions stay valid.
        "architecture": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(saved.identity).items()
            if name not in ("head", "hidden_size")
        },
        "mean": list(saved.mean),
        "std": list(saved.std),
        "decode": DECODER,
        "resize": config.inference.resize,
        "precision": config.inference.precision,
    }


def make_plan(config: PredictConfig, saved: SavedModel) -> PredictionPlan:
    """Look at the pictures and at what is at `--output`; `config` is resolved.

    Raises:
        UserError: if either can't be read or written, or there are results of something else.
    """
    folder = Folder.open(config.prediction.output, "--output")
    storage.check_writable(folder.uri, "--output")
    identity = identity_of(config, saved)
    _require_same(folder, config, identity)
    listing = list_unlabeled(config.prediction.data)
    work = plan.work_units(listing, identity, config.prediction.slice_size)
    sizes = folder.sizes()
    there = [one.key for one in work if results.name_of(one.key) in sizes]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda key: results.find(folder, key, sizes[results.name_of(key)]), there)
        done = {part.object: part for part in found if part is not None}
    return PredictionPlan(identity, len(listing), work, done)


def _require_same(folder: Folder, config: PredictConfig, identity: dict[str, Any]) -> None:
    """Refuse to replace what was not asked to be replaced."""
    before = results.read_manifest(folder)
    if before is None or config.prediction.replace:
        return
    differs = [name for name, value in identity.items() if before["identity"].get(name) != value]
    if differs:
        what = "another model" if "model" in differs else f"other settings ({', '.join(differs)})"
        raise UserError(
            f"--output {redact(folder.uri)} holds predictions of {what}, {before['model']}: name another "
            "place, or replace them with --replace"
        )
    if before["data"] != redact(config.prediction.data):
        raise UserError(
            f"--output {redact(folder.uri)} holds predictions of other pictures, {before['data']}: name "
            "another place, or replace them with --replace"
        )


def predict(config: PredictConfig, saved: SavedModel, todo: PredictionPlan, compute: Compute) -> Predictions:
    """Predict what is left, then write the manifest and delete files that it does not name.

    Raises:
        UserError: for what `compute` raises, and if too many pictures are bad.
    """
    folder = Folder.open(config.prediction.output, "--output", patient=True)
    left, done = todo.left, dict(todo.done)
    if todo.done:
        logger.info("results    %d of %d slices are there already", len(todo.done), len(todo.work))
    finished = sum(part.pictures for part in done.values())
    bad = [picture for part in done.values() for picture in part.bad]
    logger.info("pictures   %s of %s to predict, in %d slices", f"{todo.pictures - finished:,}",
                f"{todo.pictures:,}", len(left))  # fmt: skip
    _require_few_bad(config, todo.pictures, bad)
    began, already = time.monotonic(), finished
    line = log.ProgressLine(logger, enabled=True)
    for part in compute(left) if left else ():
        if part is not None:
            done[part.object] = part
            finished += part.pictures
            bad += part.bad
            _require_few_bad(config, todo.pictures, bad)
        if line.due():
            rate = (finished - already) / (time.monotonic() - began)
            left_text = f"about {log.duration((todo.pictures - finished) / rate)} left" if rate else "starting"
            line.show(f"{finished:,}/{todo.pictures:,} pictures, {rate:,.1f} images/s, {left_text}")
    line.clear()
    seconds = time.monotonic() - began
    parts = tuple(done[results.name_of(work.key)] for work in todo.work)
    return _finish(config, saved, folder, todo, parts, finished - already, seconds)


def _require_few_bad(config: PredictConfig, pictures: int, bad: Sequence[BadPicture]) -> None:
    require_few_bad(
        bad, pictures=pictures, fraction=config.inference.max_bad_fraction, uri=config.prediction.data
    )


def _finish(
    config: PredictConfig,
    saved: SavedModel,
    folder: Folder,
    todo: PredictionPlan,
    parts: tuple[ResultFile, ...],
    computed: int,
    seconds: float,
) -> Predictions:
    """Quarantine, manifest, and only then the stale files: so a manifest names only what is there."""
    bad = tuple(sorted((picture for part in parts for picture in part.bad), key=lambda picture: picture.path))
    counts: Counter[str] = Counter(dict.fromkeys(saved.identity.classes, 0))
    for part in parts:
        counts.update(part.counts)
    named = {name: counts[name] for name in saved.identity.classes}
    manifest = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": saved.source,
        "data": redact(config.prediction.data),
        "classes": list(saved.identity.classes),
        "pictures": todo.pictures,
        "predicted": sum(part.rows for part in parts),
        "bad": len(bad),
        "counts": named,
        "identity": todo.identity,
        "files": [{"object": part.object, "rows": part.rows, "bytes": part.bytes} for part in parts],
    }
    folder.write(QUARANTINE, quarantine_csv(bad).encode())
    folder.write(results.MANIFEST, results.dump_manifest(manifest))
    return Predictions(parts, bad, named, computed, seconds, _remove_stale(folder, {p.object for p in parts}))


def _remove_stale(folder: Folder, named: set[str]) -> int:
    """Delete files of predictions that the manifest does not name; nothing that has another kind of name."""
    ours = re.compile(rf"{results.FOLDER}/[0-9a-f]{{32}}{re.escape(results.SUFFIX)}")
    stale = [name for name in folder.sizes() if ours.fullmatch(name) and name not in named]
    for name in stale:
        folder.delete(name)
    return len(stale)
