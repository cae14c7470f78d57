"""Batch prediction in this process, or by Ray Data: actors on all GPUs or CPUs, one work unit a task."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from functools import partial

from cvdist import config as configs
from cvdist import log, storage
from cvdist.config import PredictConfig
from cvdist.errors import UserError
from cvdist.jobs import cli, console
from cvdist.prediction import batch
from cvdist.prediction.batch import PredictionPlan, Predictions
from cvdist.prediction.predict import Predictor
from cvdist.runtime.installed import require_ray
from cvdist.runtime.map_workers import open_workers
from cvdist.runtime.signals import sigterm_raises
from cvdist.saved import SavedModel, open_model

logger = logging.getLogger(__name__)

_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class PredictResult:
    """A finished prediction: its settings and model, what was predicted, and seconds from start to end."""

    config: PredictConfig
    saved: SavedModel
    predictions: Predictions
    seconds: float


def predict(config: PredictConfig) -> PredictResult:
    """Open the model, look at the pictures, and predict those that have no result yet.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM; what is finished is kept.
    """
    configs.check_groups(config)
    for name, meaning in (("data", "pictures"), ("output", "results")):
        if not getattr(config.prediction, name):
            raise UserError(f"--{name} is needed: the folder or URI of the {meaning}")
    began = time.monotonic()
    if config.runtime.launcher == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises():
        saved = open_model(config.saved)
        config = configs.replace(
            config,
            data=storage.absolute(config.prediction.data),
            output=storage.absolute(config.prediction.output),
        )
        config = dataclasses.replace(config, inference=batch.resolved(config.inference, saved))
        plan = batch.make_plan(config, saved)
        logger.info("model      %s, %s", saved.source, saved.identity)
        predictions = predict_planned(config, saved, plan)
    return PredictResult(config, saved, predictions, time.monotonic() - began)


def predict_planned(config: PredictConfig, saved: SavedModel, plan: PredictionPlan) -> Predictions:
    """Predict what is left of `plan`, which was made with the same settings.

    Raises:
        UserError: for all that the user can correct.
    """
    compute = open_workers(
        plan.slices,
        partial(Predictor, config.prediction.data, config.inference, saved),
        config.runtime,
        device=config.inference.device,
        actors=config.prediction.predictors,
        flag="--predictors",
        decode_workers=config.inference.decode_workers,
        verb="predicting",
    )
    return batch.predict(config, saved, plan, compute)


def present(result: PredictResult) -> int:
    """Print what came of the prediction; returns the exit code."""
    cli.show(table(result))
    return 0


def table(result: PredictResult) -> str:
    """What was predicted and where it is, and how to read it."""
    done, saved = result.predictions, result.saved
    output = log.redact(result.config.prediction.output).rstrip("/")
    rate = f", {done.computed / done.seconds:,.1f} images/s" if done.computed else ""
    most = sorted(done.counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} {count:,}" for name, count in most[:_SHOWN_CLASSES] if count)
    more = sum(count > 0 for _, count in most[_SHOWN_CLASSES:])
    stale = f", {done.removed} stale deleted" if done.removed else ""
    size = sum(one.size for one in done.files)
    total = done.rows + len(done.bad)
    rows = [
        ("model", f"{saved.source}: {saved.identity}"),
        ("pictures", f"{done.rows:,} of {total:,}, {len(done.bad)} can't be decoded (quarantine.csv)"),
        ("classes", (named or "none") + (f" and {more} more" if more else "")),
        ("computed", f"{done.computed:,} pictures in {log.duration(done.seconds)}{rate}"),
        ("results", f"{output}/predictions: {len(done.files)} files, {size / 1e6:,.2f} MB{stale}"),
        ("time", f"{log.duration(result.seconds)} in all"),
    ]
    read = f"python -c \"import pandas; print(pandas.read_parquet('{output}/predictions'))\""
    return "\n".join([*console.aligned(rows), f"next: {read}"])
