"""Batch prediction in this process or by Ray Data, with actors on all GPUs or CPUs, one work unit per task."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory

from cvdist import config as configs
from cvdist import log, storage
from cvdist.config import PredictConfig
from cvdist.data.labels import NO_CLASS
from cvdist.errors import UserError
from cvdist.jobs import console
from cvdist.prediction import batch, results
from cvdist.prediction.batch import PredictionPlan, Predictions
from cvdist.prediction.pictures import find_pictures
from cvdist.prediction.predict import Predictor
from cvdist.prediction.results import PredictedPicture
from cvdist.runtime.environment import require_ray
from cvdist.runtime.map_workers import open_workers
from cvdist.runtime.signals import sigterm_raises
from cvdist.saved import SavedModel, open_model

logger = logging.getLogger(__name__)

_SHOWN_CLASSES = 10
_FEW = 20  # pictures whose predictions are printed, and for which no cluster is started


@dataclass(frozen=True)
class PredictResult:
    """A finished prediction.

    Args:
        config: its settings.
        saved: the model.
        predictions: what was predicted.
        shown: the results of a few pictures.
        seconds: from start to end.
    """

    config: PredictConfig
    saved: SavedModel
    predictions: Predictions
    shown: list[PredictedPicture]
    seconds: float


def predict(config: PredictConfig) -> PredictResult:
    """Open the model, look at the pictures, and predict those that have no result yet.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM; what is finished is kept.
    """
    configs.check_groups(config)
    began = time.monotonic()
    if isinstance(config.prediction.data, str):  # from Python
        config = configs.replace(config, data=(config.prediction.data,))
    if not config.prediction.data:
        raise UserError("--data is needed: the pictures, as a folder, files, a pattern or a list")
    config = configs.replace(config, data_root=storage.absolute(config.prediction.root))
    pictures = find_pictures(config.prediction.data, config.prediction)
    few, output = len(pictures.table) <= _FEW, storage.absolute(config.prediction.output)
    if not output and not few:
        raise UserError(
            f"--output is needed, a folder or URI: {len(pictures.table):,} results are too many to print"
        )
    if few and config.inference.device != "cuda":
        config = configs.replace(config, runtime="inline")
    if config.runtime.launcher == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises(), ExitStack() as stack:
        saved = open_model(config.saved)
        inference = batch.resolved(config.inference, saved)
        config = dataclasses.replace(configs.replace(config, output=output), inference=inference)
        target = output or stack.enter_context(TemporaryDirectory(prefix="cvdist-predictions-"))
        plan = batch.make_plan(configs.replace(config, output=target), saved, pictures)
        logger.info("model      %s, %s", saved.source, saved.identity)
        predictions = predict_planned(config, saved, plan)
        files = [one.object for one in predictions.files if few and one.object]
        shown = [row for file in files for row in results.load(plan.slices.store.folder.read(file))]
    return PredictResult(config, saved, predictions, shown, time.monotonic() - began)


def predict_planned(config: PredictConfig, saved: SavedModel, plan: PredictionPlan) -> Predictions:
    """Predict what is left of `plan`, which was made with the same settings.

    Raises:
        UserError: for all that the user can correct.
    """
    compute = open_workers(
        plan.slices,
        partial(Predictor, plan.pictures.root, config.inference, saved),
        config.runtime,
        device=config.inference.device,
        actors=config.prediction.predictors,
        flag="--predictors",
        decode_workers=config.inference.decode_workers,
        verb="predicting",
    )
    return batch.predict(config, saved, plan, compute)


def table(result: PredictResult) -> str:
    """Format what was predicted, for a few pictures one by one, where the results are, and how to read them."""
    done, saved = result.predictions, result.saved
    output = log.redact(result.config.prediction.output).rstrip("/")
    rate = f", {done.computed / done.seconds:,.1f} images/s" if done.computed else ""
    counts = dict(done.counts)
    without = counts.pop("", 0)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} {count:,}" for name, count in most[:_SHOWN_CLASSES] if count)
    more = sum(count > 0 for _, count in most[_SHOWN_CLASSES:])
    stale = f", {done.removed} stale deleted" if done.removed else ""
    size = sum(one.size for one in done.files)
    total = done.rows + len(done.bad)
    rows = [
        ("model", f"{saved.source}: {saved.identity}"),
        ("pictures", f"{done.rows:,} of {total:,}, {len(done.bad)} can't be decoded (quarantine.csv)"),
        ("classes", (named or "none") + (f" and {more} more" if more else "")),
        *([("", f"{without:,} pictures of {NO_CLASS}")] if without else []),
        ("computed", f"{done.computed:,} pictures in {log.duration(done.seconds)}{rate}"),
        ("results", f"{output}/predictions: {len(done.files)} files, {size / 1e6:,.2f} MB{stale}"),
        ("time", f"{log.duration(result.seconds)} in all"),
    ]
    lines = console.aligned(rows if output else [rows[0], rows[-1]])
    if result.shown:
        lines += [*console.columns(*_shown(result.shown)), ""]
    if not output and done.bad:
        lines += [*(f"  {one.path}: {one.reason}" for one in done.bad), ""]
    if output:
        read = f"python -c \"import pandas; print(pandas.read_parquet('{output}/predictions'))\""
        lines.append(f"next: {read}")
    return "\n".join(lines)


def _shown(shown: Sequence[PredictedPicture]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: each picture with its class or labels, and the likeliest other class."""
    rows = []
    for one in shown:
        mine = one.likely[:1] if one.labels is None else [item for item in one.likely if item[0] in one.labels]
        others = [item for item in one.likely if item not in mine]
        rows.append([one.path, _likely(mine) or NO_CLASS, _likely(others[:1])])
    head = ["picture", "class" if shown[0].labels is None else "labels", "next"]
    width = min(2, len(shown[0].likely)) + 1
    return head[:width], [row[:width] for row in rows]


def _likely(items: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * p:.1f}%" for name, p in items)
