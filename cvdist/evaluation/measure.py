"""Measure a model on labeled pictures."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from cvdist import log
from cvdist.config import InferenceConfig
from cvdist.distributed.precision import choose_precision
from cvdist.errors import UserError
from cvdist.evaluation import metrics
from cvdist.evaluation.compare import ModelComparison
from cvdist.evaluation.metrics import Metrics, SampleResults
from cvdist.evaluation.pictures import EvaluationPictures, match_classes
from cvdist.prediction.batch import resolved
from cvdist.saved import SavedModel

logger = logging.getLogger(__name__)

SHOWN = 16  # pictures in a figure
SHOWN_DIFFERENCES = 18


@dataclass(frozen=True)
class ModelEvaluation:
    """The measurements of one model.

    Args:
        saved: the model.
        outcome: its answer to each picture.
        metrics: the metrics of these answers.
        absent: classes of the model that the data has no pictures of.
        precision: name of the precision that it was computed in.
        seconds: how long it took.
    """

    saved: SavedModel
    outcome: SampleResults
    metrics: Metrics
    absent: tuple[str, ...]
    precision: str
    seconds: float


@dataclass(frozen=True)
class Evaluations:
    """What was measured of one model, or of two on the same pictures."""

    pictures: EvaluationPictures
    first: ModelEvaluation
    second: ModelEvaluation | None
    comparison: ModelComparison | None

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain values, for JSON."""
        models = [self.first] if self.second is None else [self.first, self.second]
        return {
            "data": self.pictures.name,
            "quarantine": [dataclasses.asdict(picture) for picture in self.pictures.quarantine],
            "models": [
                {
                    "source": one.saved.source,
                    "model": str(one.saved.identity),
                    "digest": one.saved.digest,
                    "precision": one.precision,
                    **one.metrics.to_dict(),
                }
                for one in models
            ],
            "comparison": self.comparison.to_dict() if self.comparison else None,
        }


def evaluate_model(
    saved: SavedModel,
    pictures: EvaluationPictures,
    inference: InferenceConfig,
    calibration_bins: int,
    device: torch.device,
) -> ModelEvaluation:
    """Run a model over labeled pictures, and measure what it makes of them.

    Args:
        saved: the model, which is on the CPU afterwards.
        pictures: each of them is seen once.
        inference: how the model is run.
        calibration_bins: bins of confidence, of equal width, for the calibration error.
        device: the device that the model runs on.

    Raises:
        UserError: if no picture can be decoded, or the model does not know their classes.
    """
    inference = resolved(inference, saved)
    matched = match_classes(pictures, saved)
    precision = choose_precision(inference.precision, device)
    logger.info("model      %s, %s; %s on %s", saved.source, saved.identity, precision.name, device)
    began, line, parts, seen = time.monotonic(), log.ProgressLine(logger, enabled=True), [], 0
    total = len(pictures.labels)
    for rows, found in pictures.log_probabilities(saved, inference, device):
        true = matched.labels[rows]
        parts.append(metrics.sample_results(saved.identity.classes, rows, true, found, saved.thresholds))
        seen += len(rows)
        if line.due():
            rate = seen / (time.monotonic() - began)
            left = log.duration((total - seen) / rate) if rate else "?"
            line.show(f"{seen:,}/{total:,} pictures, {rate:,.1f} images/s, about {left} left")
    line.clear()
    if not seen:
        raise UserError(f"{pictures.name} has no picture that can be decoded")
    saved.model.to("cpu")  # room on the device for another one
    gc.collect()
    outcome = metrics.concatenate(parts)
    measured = metrics.compute_metrics(outcome, calibration_bins)
    return ModelEvaluation(saved, outcome, measured, matched.absent, precision.name, time.monotonic() - began)
