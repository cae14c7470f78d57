"""Evaluate a trained model, or two, on labeled pictures in this process."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cvdist import config as configs
from cvdist import log, storage, tracking
from cvdist.config import EvaluateConfig
from cvdist.data.quarantine import QUARANTINE, quarantine_csv
from cvdist.distributed import device as devices
from cvdist.errors import UserError
from cvdist.evaluation import page
from cvdist.evaluation.compare import compare_models
from cvdist.evaluation.measure import SHOWN_DIFFERENCES, Evaluations, ModelEvaluation, evaluate_model
from cvdist.evaluation.metrics import ClassMetrics
from cvdist.evaluation.pictures import open_pictures
from cvdist.jobs import cli, console
from cvdist.log import redact
from cvdist.runtime.signals import sigterm_raises
from cvdist.saved import SavedModel, open_model
from cvdist.tracking import RunRef, TrackingStore, environment, open_tracker

logger = logging.getLogger(__name__)

_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class EvaluateResult:
    """A finished evaluation.

    Args:
        config: its settings.
        evaluation: what was measured.
        run: the MLflow run that holds the results; None without one.
        registered: the version in the registry, `models:/NAME/VERSION @ALIAS`; empty if none was asked for.
        seconds: from start to end.
    """

    config: EvaluateConfig
    evaluation: Evaluations
    run: RunRef | None
    registered: str
    seconds: float


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measure the models, log the results, write them, and register the model.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM.
    """
    began = time.monotonic()
    configs.check_groups(config)
    asked = config.evaluation
    configs.require_outside(asked.root or asked.data, cache=str(configs.cache_folder(asked.cache)))
    if asked.register:
        configs.check_registration(asked.register, asked.alias)
    config = configs.replace(config, data=storage.absolute(asked.data), data_root=storage.absolute(asked.root))
    with sigterm_raises():
        device = devices.here(config.inference.device)
        saved = open_model(config.saved)
        if asked.register and not (saved.run and saved.model_id):
            raise UserError(
                f"--register is for models that an MLflow run has logged, and {saved.source} is none: name "
                "the run"
            )
        store = tracking.open_tracking_store(config.saved.tracking(asked.tracking), config.saved.storage)
        evaluation = _measure(config, saved, device)
        if asked.output:
            content = json.dumps(evaluation.to_dict(), indent=1).encode()
            storage.write_files({asked.output: content}, "--output")
        run = _log(store, evaluation) if store is not None else None
        registered = _register(config, evaluation) if asked.register else ""
    return EvaluateResult(config, evaluation, run, registered, time.monotonic() - began)


def _measure(config: EvaluateConfig, saved: SavedModel, device: torch.device) -> Evaluations:
    """Measure `saved`, and the model that it is compared with, if there is one."""
    saved.require_classifier()
    pictures = open_pictures(config, saved)
    logger.info("data       %s: %s pictures", pictures.name, f"{len(pictures.labels):,}")
    other = _open_second(config, saved) if config.evaluation.compare else None
    bins = config.evaluation.calibration_bins
    first = evaluate_model(saved, pictures, config.inference, bins, device)
    if other is None:
        return Evaluations(pictures, first, None, None)
    second = evaluate_model(other, pictures, config.inference, bins, device)
    return Evaluations(
        pictures, first, second, compare_models(first.outcome, second.outcome, SHOWN_DIFFERENCES)
    )


def _open_second(config: EvaluateConfig, first: SavedModel) -> SavedModel:
    second = open_model(dataclasses.replace(config.saved, source=config.evaluation.compare))
    second.require_classifier()
    if first.identity.multilabel != second.identity.multilabel:
        one, several = (first, second) if second.identity.multilabel else (second, first)
        raise UserError(
            f"--compare: {several.source} gives a picture several labels and {one.source} one: they can't be "
            "compared"
        )
    mine, theirs = set(first.identity.classes), set(second.identity.classes)
    if mine != theirs:
        raise UserError(
            f"--compare {second.source}: its classes are others than those of {first.source}: "
            f"{', '.join(sorted(mine ^ theirs, key=log.natural)[:5])} only in one of them"
        )
    return second


def _register(config: EvaluateConfig, evaluation: Evaluations) -> str:
    from cvdist.tracking import registry

    saved, found = evaluation.first.saved, evaluation.first.metrics
    assert saved.run is not None
    result = str(found)
    name, alias = config.evaluation.register, config.evaluation.alias
    version = registry.register(
        saved.run,
        saved.model_id,
        name,
        alias,
        description=f"{result} on {evaluation.pictures.name}; {saved.identity}",
        tags={"evaluation": result, "evaluation.data": evaluation.pictures.name, "digest": saved.digest},
    )
    return f"{version} @{alias}"


# ------------------------------------------------------------------------------------------------- MLflow


def _log(store: TrackingStore, evaluation: Evaluations) -> RunRef:
    """Log the results as a run of their own, below the run that trained the model. Returns it, ended."""
    saved = evaluation.first.saved
    trained_by = saved.run if saved.run is not None and saved.run.tracking_uri == store.tracking_uri else None
    tags = {
        "cvdist.kind": "evaluation",
        "cvdist.model": saved.source,
        "cvdist.model_digest": saved.digest,
        **environment.run_tags(),
    }
    if trained_by is not None:
        store = TrackingStore(store.tracking_uri, trained_by.experiment_id)
        tags |= {"cvdist.trained_by": trained_by.run_id, tracking.PARENT_TAG: trained_by.run_id}
    second = evaluation.second
    if second is not None:
        tags["cvdist.compared_with"] = second.saved.source
    run = tracking.create_run(store, f"evaluation of {saved.name}", tags)
    with tracking.end_run_on_exit(run):
        tracker = open_tracker(run, 0, 0, "")
        tracker.log_params(
            {
                "model": saved.source,
                "data": evaluation.pictures.name,
                "precision": evaluation.first.precision,
                "compared_with": second.saved.source if second is not None else "",
            }
        )
        values = page.mlflow_metrics(evaluation.first.metrics)
        if evaluation.comparison is not None and second is not None:
            values |= {f"second_{name}": value for name, value in page.mlflow_metrics(second.metrics).items()}
            values["comparison/mcnemar_p"] = evaluation.comparison.p
        tracker.log_metrics(values, step=0)
        for name, draw in page.figures(evaluation).items():
            tracker.log_figure(name, draw)
        tracker.log_text("classes.csv", page.class_table(evaluation.first.metrics))
        tracker.log_text("evaluation.json", json.dumps(evaluation.to_dict(), indent=1))
        if evaluation.pictures.quarantine:
            tracker.log_text(QUARANTINE, quarantine_csv(evaluation.pictures.quarantine))
        tracker.close()
        tracking.link_model(run, saved.model_id)
        tracking.set_description(run, page.description(evaluation, environment.command()))
    return run


# ------------------------------------------------------------------------------------------------- printing


def table(result: EvaluateResult) -> str:
    """Format the figures, the classes, where two models differ, and the next command."""
    evaluation, config = result.evaluation, result.config
    models = [one for one in (evaluation.first, evaluation.second) if one is not None]
    names = ["model"] if len(models) == 1 else ["A", "B"]
    rows = [
        (name, f"{one.saved.source}: {one.saved.identity}") for name, one in zip(names, models, strict=True)
    ]
    bad = len(evaluation.pictures.quarantine)
    seen = evaluation.first.metrics.total
    rows.append(("data", f"{evaluation.pictures.name}: {seen:,} pictures, {bad} more can't be decoded"))
    if absent := evaluation.first.absent:
        rows.append(("no pictures of", f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"))
    lines = console.aligned(rows) + console.columns(["", *names[: len(models)]], _figures(models))
    lines += ["", *console.columns(*_by_class(models, names)), ""]
    if (comparison := evaluation.comparison) is not None:
        lines += [
            f"  both right {comparison.both:,}, only A {comparison.only_first:,}, only B "
            f"{comparison.only_second:,}, both wrong {comparison.neither:,}",
            f"  McNemar's exact test: p = {comparison.p:.3g}{_verdict(comparison.p)}",
            "",
        ]
    if config.evaluation.output:
        lines.append(f"  written to {redact(config.evaluation.output)}")
    if result.registered:
        lines.append(f"  registered as {result.registered}")
    if config.evaluation.output or result.registered:
        lines.append("")
    if result.run is not None:
        lines.append(f"next: {console.open_run(result.run)}")
    else:
        lines.append(
            f"next: {cli.command('predict')} {redact(config.saved.source)} --data PICTURES --output RESULTS"
        )
    return "\n".join(lines)


def _verdict(p: float) -> str:
    return ": different at the 5% level" if p < 0.05 else ": not different at the 5% level"


def _figures(models: Sequence[ModelEvaluation]) -> list[list[str]]:
    """Return one row for each figure, with one column for each model."""
    found = [one.metrics for one in models]
    right = [log.percent(one.correct, one.total) for one in found]
    balanced = []
    if models[0].outcome.multilabel:
        precision = ["mean average precision", *(f"{one.mean_average_precision:.4f}" for one in found)]
        rows = [precision, ["exact matches", *right]]
    else:
        rows = [["accuracy", *right]]
        balanced = [["balanced accuracy", *(f"{one.balanced_accuracy:.2%}" for one in found)]]
    if found[0].top_correct is not None:
        rows.append(["top 5", *(log.percent(one.top_correct or 0, one.total) for one in found)])
    return [
        *rows,
        ["loss", *(f"{one.loss:.4f}" for one in found)],
        *balanced,
        ["macro F1", *(f"{one.macro_f1:.4f}" for one in found)],
        ["calibration error", *(f"{100 * one.calibration_error:.2f}%" for one in found)],
        ["Brier score", *(f"{one.brier:.4f}" for one in found)],
    ]


def _by_class(models: Sequence[ModelEvaluation], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of classes; of many classes, only those that are recognized worst.

    Two models are shown side by side, by recall or, with several labels per picture, by average precision.
    """
    several, first = models[0].outcome.multilabel, models[0].metrics.by_class

    def quality(one: ClassMetrics) -> float:
        return (one.average_precision if several else one.recall) or 0.0

    worst = sorted((one for one in first if one.total), key=quality)[:_SHOWN_CLASSES]
    kept = {one.name for one in (first if len(first) <= 2 * _SHOWN_CLASSES else worst)}
    shown = [one for one in first if one.name in kept]
    title = "class" if len(kept) == len(first) else f"worst {len(kept)} of {len(first)} classes"
    if len(models) == 1:
        rows = [
            [
                one.name,
                *([_decimal(one.average_precision), _decimal(one.threshold)] if several else []),
                console.share(one.correct, one.predicted),
                console.share(one.correct, one.total),
                _decimal(one.f1),
            ]
            for one in shown
        ]
        extra = ["average precision", "threshold"] if several else []
        return [title, *extra, "precision", "recall", "F1"], rows
    second = {one.name: one for one in models[1].metrics.by_class}
    rows = []
    for one in shown:
        other = second[one.name]
        if several:
            values = [_decimal(found.average_precision) for found in (one, other)]
            difference = f"{quality(other) - quality(one):+.4f}" if one.total else "-"
        else:
            values = [console.share(found.correct, one.total) for found in (one, other)]
            difference = f"{other.correct - one.correct:+d}"
        rows.append([one.name, *values, difference])
    what = "average precision" if several else "recall"
    return [title, *(f"{what} {name}" for name in names), "B - A"], rows


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
