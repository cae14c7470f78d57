"""Plan a batch prediction, run it, and write its manifest. How the model is run is up to the caller."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cvdist import resumable_map, storage
from cvdist.config import InferenceConfig, PredictConfig, cache_folder, require_outside
from cvdist.data.images.decode import FORMAT as DECODER
from cvdist.data.images.versions import with_versions
from cvdist.data.quarantine import BadPicture
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.prediction import results
from cvdist.prediction.pictures import NamedPictures
from cvdist.resumable_map import Compute, MapPlan, Receipt, ResultStore
from cvdist.saved import SavedModel
from cvdist.storage import Folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionPlan:
    """The plan of a prediction: its pictures, their slices, and what predictions depend on (`identity_of`)."""

    identity: dict[str, Any]
    pictures: NamedPictures
    slices: MapPlan


@dataclass(frozen=True)
class Predictions:
    """A finished prediction.

    Attributes:
        files: receipts of all result files.
        bad: pictures that can't be decoded.
        counts: number of pictures that were taken for each class. With several labels, a picture counts for
            each, and the empty name is for those without any.
        rows: number of pictures that have a prediction.
        computed: number of pictures that this job has predicted.
        seconds: time that they took.
        removed: number of stale result files that were deleted.
    """

    files: tuple[Receipt, ...]
    bad: tuple[BadPicture, ...]
    counts: dict[str, int]
    rows: int
    computed: int
    seconds: float
    removed: int


def resolved(inference: InferenceConfig, saved: SavedModel) -> InferenceConfig:
    """Return `inference`, with the settings that it leaves open taken from the model's run.

    Raises:
        UserError: if the model can't classify pictures.
    """
    saved.require_classifier()
    shape = saved.identity
    if shape.height != shape.width or shape.channels not in (1, 3):
        raise UserError(
            f"{saved.source} takes {shape}: only square pictures, gray or in color, can be classified"
        )
    chosen = inference.precision if inference.precision != "auto" else saved.precision
    return replace(inference, resize=inference.resize or saved.learned_resize(), precision=chosen)


def identity_of(config: PredictConfig, saved: SavedModel) -> dict[str, Any]:
    """Return everything that the prediction of a given picture depends on."""
    return {
        "model": saved.digest,
        "architecture": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(saved.identity).items()
        },
        "mean": list(saved.mean),
        "std": list(saved.std),
        "decode": DECODER,
        "resize": config.inference.resize,
        "precision": config.inference.precision,
        **({"thresholds": list(saved.thresholds)} if saved.identity.multilabel else {}),
    }


def make_plan(config: PredictConfig, saved: SavedModel, pictures: NamedPictures) -> PredictionPlan:
    """Compare the pictures with the results at `--output`; the settings of inference are `resolved`.

    Raises:
        UserError: if either can't be read or written, or the results are of other pictures, models or settings.
    """
    for word in (*config.prediction.data, config.prediction.root):
        require_outside(word, output=config.prediction.output)
    store = ResultStore.open(config.prediction.output, "--output", "predictions", ".parquet")
    storage.check_writable(store.folder.uri, "--output")
    identity = identity_of(config, saved)
    _require_same(store.folder, config, identity, pictures.words)
    listing = pictures.table
    if pictures.whole:
        listing = with_versions(listing, pictures.root, cache_folder(""))
    bounds = resumable_map.stable_bounds(listing.column("path").to_pylist(), config.prediction.slice_size)
    units = resumable_map.work_units(listing, {"identity": identity}, bounds)
    return PredictionPlan(identity, pictures, store.plan(units, store.folder.sizes()))


def _require_same(folder: Folder, config: PredictConfig, identity: dict[str, Any], data: str) -> None:
    """Refuse to replace results of other pictures, models or settings without `--replace`."""
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
    if before["data"] != data:
        raise UserError(
            f"--output {redact(folder.uri)} holds predictions of other pictures, {before['data']}: name "
            "another place, or replace them with --replace"
        )


def predict(config: PredictConfig, saved: SavedModel, todo: PredictionPlan, compute: Compute) -> Predictions:
    """Predict what is left, then write the manifest and delete files that it does not name.

    Raises:
        UserError: if `compute` raises one, or too many pictures can't be decoded.
    """
    slices, left, pictures = todo.slices, todo.slices.left, len(todo.pictures.table)
    if slices.done:
        logger.info("results    %d of %d slices are there already", len(slices.done), len(slices.units))
    logger.info("pictures   %s of %s to predict, in %d slices", f"{sum(len(unit.paths) for unit in left):,}",
                f"{pictures:,}", len(left))  # fmt: skip
    mapped = resumable_map.run(
        slices,
        compute,
        noun="slices",
        data=todo.pictures.words,
        pictures=pictures,
        max_bad_fraction=config.inference.max_bad_fraction,
    )
    counts: Counter[str] = Counter()
    for receipt in mapped.receipts:
        counts.update(receipt.values["counts"])
    names = [*saved.identity.classes, *([""] if saved.identity.multilabel else [])]
    named = {name: counts[name] for name in names}
    rows = pictures - len(mapped.bad)
    manifest = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": saved.source,
        "data": todo.pictures.words,
        "classes": list(saved.identity.classes),
        "pictures": pictures,
        "predicted": rows,
        "bad": len(mapped.bad),
        "counts": named,
        "identity": todo.identity,
        "files": [
            {"object": one.object, "rows": one.pictures - len(one.bad), "bytes": one.size}
            for one in mapped.receipts
        ],
    }
    slices.store.publish(results.dump_manifest(manifest), mapped.bad)
    removed = slices.remove_stale(mapped.receipts)
    return Predictions(mapped.receipts, mapped.bad, named, rows, mapped.computed, mapped.seconds, removed)
