"""Make a run's `report.html` from what MLflow has about the run, and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import cast

from cvdist import config as configs
from cvdist import log, recipes, storage
from cvdist.config import ReportConfig, SelectBy
from cvdist.data.quarantine import QUARANTINE
from cvdist.errors import UserError
from cvdist.jobs import console
from cvdist.report_html import figures
from cvdist.report_html.content import FigureFile, Report, Setting
from cvdist.report_html.embed import TYPES
from cvdist.report_html.page import render
from cvdist.results import EpochRecord, RidgeResult
from cvdist.tracking.find import find_run
from cvdist.tracking.run import RunRef, first_line
from cvdist.tracking.stored_run import StoredRun, put_text

logger = logging.getLogger(__name__)

NAME = "report.html"

_FIGURES = "figures"
_ALL_SECONDS = 120.0
_LARGEST_FILE = 100 * 2**20  # bytes of one figure
_DEEPEST = 3  # folders below `figures`
_MOST_CLASSES = 30  # most classes that the report names
# Tags that `cvdist.tracking.environment` sets, by what the report calls them.
_PLACES = {
    "mlflow.source.git.commit": "Commit",
    "host.name": "Host",
    "host.os": "System",
    "ray.job_id": "Ray job",
}


@dataclass(frozen=True)
class ReportResult:
    """A report that was made: the run, the file (empty: among the run's artifacts), and the page's bytes."""

    run: RunRef
    path: str
    size: int


def report(config: ReportConfig) -> ReportResult:
    """Make the page of a run again.

    Raises:
        UserError: if there is no such run or store, or the file can't be written.
    """
    configs.check_groups(config)
    if not config.page.run:
        raise UserError("name a run, by its name or id")
    run = find_run(config.lookup, config.page.run)
    page, output = build(run.tracking_uri, run.run_id), config.page.output
    if output:
        storage.write_files({output: page.encode()}, "--output")
    else:
        put_text(run.tracking_uri, run.run_id, NAME, page)
    return ReportResult(run, output, len(page.encode()))


def build(tracking_uri: str, run_id: str, *, ended: bool = False) -> str:
    """Build the page of a run; `ended`: whether its owner is about to end it and nothing went wrong."""
    with StoredRun(tracking_uri, run_id) as run:
        return render(_content(run, ended))


def log_report_or_warn(ref: RunRef, *, ended: bool = True) -> None:
    """Put the page among the run's artifacts at a job's end; a page that can't be made costs a warning.

    Args:
        ref: the run.
        ended: whether the run's owner is about to end it and nothing went wrong.
    """
    try:
        put_text(ref.tracking_uri, ref.run_id, NAME, build(ref.tracking_uri, ref.run_id, ended=ended))
    except Exception as error:  # the job's result stands
        logger.warning("no %s: %s; python jobs/report.py %s makes it", NAME, first_line(error), ref.run_id)
        logger.debug("", exc_info=True)


def table(result: ReportResult) -> str:
    """Say where the report is, and how to open it."""
    if not result.path:
        page = console.page_after(result.run, f"/artifacts/{NAME}")
        return f"{NAME} is among the artifacts of the run {result.run.run_id}\nnext: open {page}"
    size = f"{result.size / 1e6:.1f} MB"
    return f"{log.redact(result.path)}: {size}\nnext: open it in a browser, or send it to someone"


# ------------------------------------------------------------------------------------------------- content


def _content(run: StoredRun, ended: bool) -> Report:
    parameters = run.params
    pictures, left_out = _pictures(run)
    ridge = _ridge(run.metrics)
    names = [parameters.get("model.name"), run.dataset.name if run.dataset else None]
    return Report(
        name=run.name,
        status="" if ended or run.finished else run.status,
        subject=" on ".join(filter(None, names)),
        started=_date(run.started),
        command=run.tags.get("cvdist.command", ""),
        recipe=parameters.get("recipe", ""),
        trained=_data(run) | _model(parameters) | _baseline(ridge),
        epochs=_epochs(run),
        first_step_seconds=run.first_step_seconds,
        ridge=ridge,
        settings=_settings(parameters),
        environment=_environment(run),
        quarantine=tuple((row[0], row[1]) for row in run.read_table(QUARANTINE) if len(row) > 1),
        classes=_classes(run),
        pictures=pictures,
        left_out=left_out,
    )


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds else ""


def _environment(run: StoredRun) -> dict[str, str]:
    places = {name: run.tags.get(key, "") for key, name in _PLACES.items()}
    versions = {key.partition(".")[2]: run.tags[key] for key in sorted(run.tags) if key.startswith("version.")}
    return places | {"MLflow run": run.run_id, "cvdist": run.tags.get("cvdist.version", "")} | versions


def _settings(parameters: Mapping[str, str]) -> tuple[Setting, ...]:
    """Return the configuration, in its own order and with the recipe's values, then all other parameters."""
    order = [name for name, _ in configs.flat(configs.TrainConfig()) if name != "recipe"]
    try:
        usual = {
            name: log.redact(str(value)) for name, value in configs.flat(recipes.find(parameters["recipe"]))
        }
    except (KeyError, UserError):
        usual = {}
    # A run's name is no change of the recipe.
    usual["run.name"] = parameters.get("run.name", "")
    settings = [
        Setting(group, field, parameters[name], usual.get(name) if len(usual) > 1 else None)
        for name in order
        if name in parameters
        for group, _, field in [name.partition(".")]
    ]
    rest = sorted(set(parameters) - set(order) - {"recipe"})
    return (*settings, *(Setting("found at the start", name, parameters[name]) for name in rest))


def _data(run: StoredRun) -> dict[str, str]:
    if run.dataset is None:
        return {}
    name, source, profile = run.dataset.name, run.dataset.source, run.dataset.profile
    train, valid = int(profile.get("train", 0)), int(profile.get("valid", 0))
    shape = str(run.dataset.schema.get("mlflow_tensorspec", {}).get("features", "")).removeprefix("uint8 ")
    classes = [str(name) for name in profile.get("classes", ())]
    more = len(classes) - _MOST_CLASSES
    listed = ", ".join(classes[:_MOST_CLASSES]) + (f" and {more} more" if more > 0 else "")
    return {
        "Data": f"{name} · {source}" if source not in ("", name) else name,
        "Pictures": f"{train:,} for training, {valid:,} for validation" if train else "",
        "A picture": f"{shape} (channels, height, width)" if shape else "",
        "Classes": f"{len(classes)}: {listed}" if classes else "",
        "SHA-256 of the data": run.params.get("data.sha256", run.dataset.digest),
    }


def _model(parameters: Mapping[str, str]) -> dict[str, str]:
    trained, frozen, workers = (
        int(value) if (value := parameters.get(f"run.{name}", "")).isdecimal() else 0
        for name in ("parameters", "frozen_parameters", "world_size")
    )
    hardware = parameters.get("run.hardware")
    return {
        "Model": parameters.get("model.name", ""),
        "Parameters": f"{trained:,} trained" + (f", {frozen:,} frozen" if frozen else "") if trained else "",
        "Pretrained weights": parameters.get("model.weights", ""),
        "SHA-256 of the weights": parameters.get("weights.sha256", ""),
        "Normalization": parameters.get("weights.normalization", ""),
        "Workers": f"{workers}" + (f" on {hardware}" if hardware else "") if workers else "",
        "Precision": parameters.get("run.precision", ""),
        "Recipe": parameters.get("recipe", ""),
    }


def _baseline(ridge: RidgeResult | None) -> dict[str, str]:
    return {"Baseline": f"ridge probe on the features: {ridge}, penalty {ridge.penalty:.3g}"} if ridge else {}


def _ridge(metrics: Mapping[str, float]) -> RidgeResult | None:
    """Return the linear baseline, or None until all its metrics have arrived in MLflow."""
    try:
        return RidgeResult(
            correct=int(metrics["ridge/valid_correct"]),
            total=int(metrics["ridge/valid_total"]),
            penalty=metrics["ridge/penalty"],
            seconds=metrics["ridge/seconds"],
            mean_average_precision=metrics.get("ridge/valid_mean_average_precision"),
        )
    except KeyError:
        return None


def _epochs(run: StoredRun) -> tuple[EpochRecord, ...]:
    """Return the epochs whose metrics have all arrived in MLflow."""
    needed = {
        name: run.history(name)
        for name in (
            *(f"{phase}/{what}" for phase in ("train", "valid") for what in ("loss", "correct", "total")),
            "train/learning_rate",
            "speed/epoch_seconds",
            "speed/samples_per_second",
        )
    }
    memory = run.history("memory/peak_mb")
    precision = run.history("valid/mean_average_precision")
    balanced, f1 = run.history("valid/balanced_accuracy"), run.history("valid/macro_f1")
    complete = sorted(set.intersection(*(set(points) for points in needed.values())))
    return tuple(
        EpochRecord(
            epoch=epoch,
            train_loss=needed["train/loss"][epoch],
            train_correct=int(needed["train/correct"][epoch]),
            train_total=int(needed["train/total"][epoch]),
            valid_loss=needed["valid/loss"][epoch],
            valid_correct=int(needed["valid/correct"][epoch]),
            valid_total=int(needed["valid/total"][epoch]),
            learning_rate=needed["train/learning_rate"][epoch],
            seconds=needed["speed/epoch_seconds"][epoch],
            samples_per_second=needed["speed/samples_per_second"][epoch],
            peak_memory=int(memory.get(epoch, 0.0) * 2**20),
            valid_balanced_accuracy=balanced.get(epoch, 0.0),
            valid_macro_f1=f1.get(epoch, 0.0),
            select_by=cast(SelectBy, run.params.get("run.select_by", "accuracy")),
            valid_mean_average_precision=precision.get(epoch),
        )
        for epoch in complete
    )


def _classes(run: StoredRun) -> tuple[tuple[str, ...], ...]:
    """Return the results of each class, as text. Empty unless a picture may have several classes."""
    return tuple(
        (name, pictures, *(f"{float(value):.4f}" if value else "-" for value in values))
        for name, pictures, *values in run.read_table("classes.csv")
    )


def _pictures(run: StoredRun) -> tuple[tuple[FigureFile, ...], tuple[str, ...]]:
    """Return the figures among the artifacts, and a line for each that is left out."""
    found = run.files(_FIGURES, _DEEPEST)
    sizes = {str(PurePosixPath(path).relative_to(_FIGURES)): size for path, size in found.items()}
    paths, left_out = figures.select_figures(
        [path for path in sizes if PurePosixPath(path).suffix.lower() in TYPES]
    )
    pictures = []
    deadline = time.monotonic() + _ALL_SECONDS
    for path in paths:
        where = f"{_FIGURES}/{path}"
        if sizes[path] > _LARGEST_FILE:
            left_out.append(f"{where}, {sizes[path] / 1e6:,.0f} MB")
            continue
        if time.monotonic() > deadline:
            left_out.append(f"{where}: the MLflow server took more than {_ALL_SECONDS:g} s for the others")
            continue
        try:
            pictures.append(FigureFile(path, run.read(where)))
        except Exception as error:  # one picture less is still a report
            left_out.append(f"{where} could not be fetched: {first_line(error)}")
    return tuple(pictures), tuple(left_out)
