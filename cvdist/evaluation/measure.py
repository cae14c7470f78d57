"""An evaluation from its start to its results."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from cvdist import log, storage
from cvdist.config import EvaluateConfig
from cvdist.distributed.precision import choose_precision
from cvdist.errors import UserError
from cvdist.evaluation import metrics
from cvdist.evaluation.compare import Comparison, compare
from cvdist.evaluation.metrics import Metrics, Outcome
from cvdist.evaluation.pictures import Pictures, match_classes, open_pictures
from cvdist.prediction.batch import resolved
from cvdist.saved import SavedModel, open_model

logger = logging.getLogger(__name__)

SHOWN = 16  # pictures in a figure
SHOWN_DIFFERENCES = 18


@dataclass(frozen=True)
class Measured:
    """One model on the data. absent: classes of the model that the data has no pictures of."""

    saved: SavedModel
    outcome: Outcome
    metrics: Metrics
    absent: tuple[str, ...]
    precision: str
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One model, or two of them on the same pictures."""

    pictures: Pictures
    first: Measured
    second: Measured | None
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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


def evaluate(config: EvaluateConfig, saved: SavedModel, device: torch.device) -> Evaluation:
    """Measure `saved`, and the model that it is compared with, if there is one.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
    """
    saved.require_classifier()
    pictures = open_pictures(config, saved)
    logger.info("data       %s: %s pictures", pictures.name, f"{len(pictures.labels):,}")
    other = _open_second(config, saved) if config.evaluation.compare else None
    first = _measure(config, saved, pictures, device)
    if other is None:
        return Evaluation(pictures, first, None, None)
    second = _measure(config, other, pictures, device)
    return Evaluation(pictures, first, second, compare(first.outcome, second.outcome, SHOWN_DIFFERENCES))


def _open_second(config: EvaluateConfig, first: SavedModel) -> SavedModel:
    second = open_model(dataclasses.replace(config.saved, source=config.evaluation.compare))
    second.require_classifier()
    mine, theirs = set(first.identity.classes), set(second.identity.classes)
    if mine != theirs:
        raise UserError(
            f"--compare {second.source}: its classes are others than those of {first.source}: "
            f"{', '.join(sorted(mine ^ theirs)[:5])} only in one of them"
        )
    return second


def _measure(config: EvaluateConfig, saved: SavedModel, pictures: Pictures, device: torch.device) -> Measured:
    inference = resolved(config.inference, saved)
    matched = match_classes(pictures, saved)
    precision = choose_precision(inference.precision, device)
    logger.info("model      %s, %s; %s on %s", saved.source, saved.identity, precision.name, device)
    began, line, parts, seen = time.monotonic(), log.ProgressLine(logger, enabled=True), [], 0
    total = len(pictures.labels)
    for rows, found in pictures.seen_by(saved, inference, device):
        true = matched.place[pictures.labels[rows]]
        parts.append(metrics.outcome(saved.identity.classes, rows, true, found))
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
    outcome = metrics.join(parts)
    measured = metrics.measure(outcome, config.evaluation.calibration_bins)
    return Measured(saved, outcome, measured, matched.absent, precision.name, time.monotonic() - began)


def write_json(uri: str, evaluation: Evaluation) -> None:
    """Write the results to the file or URI `uri`, whole or not at all.

    Raises:
        UserError: if it can't be written.
    """
    filesystem, path = storage.locate(uri, "--output")
    try:
        storage.write(filesystem, path, json.dumps(evaluation.to_dict(), indent=1).encode())
    except OSError as error:
        raise UserError(f"--output {log.redact(uri)} can't be written ({storage.reason(error)})") from error
