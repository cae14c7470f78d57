"""A run's `report.html`, from what MLflow has about the run and nothing else."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from cvdist import config as configs
from cvdist import log, recipes
from cvdist.config import ReportConfig
from cvdist.data.quarantine import QUARANTINE
from cvdist.errors import UserError
from cvdist.jobs import cli
from cvdist.report_html import figures
from cvdist.report_html.content import DataSummary, FigureFile, ModelSummary, Report, Setting
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
# Tags that `cvdist.tracking.environment` sets, by what the report calls them.
_PLACES = {
    "mlflow.source.git.commit": "Commit",
    "host.name": "Host",
    "host.os": "System",
    "ray.job_id": "Ray job",
}


@dataclass(frozen=True)
class ReportResult:
    """A report that was made: the run, the file (None: among the run's artifacts), and the page's bytes."""

    run: RunRef
    path: Path | None
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
    page = build(run.tracking_uri, run.run_id)
    if not config.page.output:
        put_text(run.tracking_uri, run.run_id, NAME, page)
        return ReportResult(run, None, len(page.encode()))
    path = Path(config.page.output)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror}") from error
    return ReportResult(run, path, len(page.encode()))


def build(tracking_uri: str, run_id: str, *, ended: bool = False) -> str:
    """The page of a run; `ended` says that its owner is about to end it, and that nothing went wrong."""
    with StoredRun(tracking_uri, run_id) as run:
        return render(_content(run, ended))


def log_report_or_warn(ref: RunRef, *, ended: bool = True) -> None:
    """Put the page among the run's artifacts at a job's end; a page that can't be made costs a warning.

    Args:
        ref: the run.
        ended: as in `build`.
    """
    try:
        put_text(ref.tracking_uri, ref.run_id, NAME, build(ref.tracking_uri, ref.run_id, ended=ended))
    except Exception as error:  # the job's result stands
        logger.warning("no %s: %s; python jobs/report.py %s makes it", NAME, first_line(error), ref.run_id)
        logger.debug("", exc_info=True)


def present(result: ReportResult) -> int:
    """Print where the report is; returns the exit code."""
    if result.path is None:
        cli.show(
            f"{NAME} is among the artifacts of the run {result.run.run_id}\n"
            f"next: open {result.run.page}/artifacts/{NAME}"
        )
    else:
        cli.show(
            f"{result.path}: {result.size / 1e6:.1f} MB\nnext: open it in a browser, or send it to someone"
        )
    return 0


# ------------------------------------------------------------------------------------------------- content


def _content(run: StoredRun, ended: bool) -> Report:
    parameters = run.params
    pictures, left_out = _pictures(run)
    world_size = parameters.get("run.world_size", "")
    settings, facts = _settings(parameters)
    return Report(
        name=run.name,
        status="" if ended or run.finished else run.status,
        recipe=parameters.get("recipe", ""),
        command=run.tags.get("cvdist.command", ""),
        started=_date(run.started),
        address=_address(run),
        data=_data(run),
        model=_model(parameters),
        workers=int(world_size) if world_size.isdecimal() else 0,
        hardware=parameters.get("run.hardware", ""),
        precision=parameters.get("run.precision", ""),
        epochs=_epochs(run),
        first_step_seconds=run.first_step_seconds,
        ridge=_ridge(run.metrics),
        settings=settings,
        facts=facts,
        versions=tuple(
            [("cvdist", run.tags[key]) for key in ("cvdist.version",) if key in run.tags]
            + [(key.partition(".")[2], run.tags[key]) for key in sorted(run.tags) if key.startswith("version.")]
        ),
        quarantine=tuple((row[0], row[1]) for row in run.read_table(QUARANTINE) if len(row) > 1),
        pictures=pictures,
        left_out=left_out,
    )


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds else ""


def _address(run: StoredRun) -> tuple[tuple[str, str], ...]:
    places = [(name, run.tags[key]) for key, name in _PLACES.items() if run.tags.get(key)]
    return (*places, ("MLflow run", run.run_id))


def _settings(parameters: Mapping[str, str]) -> tuple[tuple[Setting, ...], tuple[tuple[str, str], ...]]:
    """The configuration, in its own order and next to the recipe's; and all other parameters."""
    order = [name for name, _ in configs.flat(configs.TrainConfig()) if name != "recipe"]
    try:
        usual = {
            name: log.redact(str(value)) for name, value in configs.flat(recipes.find(parameters["recipe"]))
        }
    except (KeyError, UserError):
        usual = {}
    # A new name is not another configuration.
    usual["run.name"] = parameters.get("run.name", "")
    settings = tuple(
        Setting(group, field, parameters[name], usual.get(name) if len(usual) > 1 else None)
        for name in order
        if name in parameters
        for group, _, field in [name.partition(".")]
    )
    rest = sorted(set(parameters) - set(order) - {"recipe"})
    return settings, tuple((name, parameters[name]) for name in rest)


def _data(run: StoredRun) -> DataSummary | None:
    dataset = run.dataset
    if dataset is None:
        return None
    features = str(dataset.schema.get("mlflow_tensorspec", {}).get("features", ""))
    return DataSummary(
        name=dataset.name,
        source=dataset.source,
        shape=features.removeprefix("uint8 "),
        classes=tuple(map(str, dataset.profile.get("classes", ()))),
        train_size=int(dataset.profile.get("train", 0)),
        valid_size=int(dataset.profile.get("valid", 0)),
        sha256=run.params.get("data.sha256", dataset.digest),
    )


def _model(parameters: Mapping[str, str]) -> ModelSummary | None:
    name = parameters.get("model.name", "")
    if not name:
        return None
    trained, frozen = (parameters.get(f"run.{which}", "0") for which in ("parameters", "frozen_parameters"))
    return ModelSummary(
        name=name,
        trained=int(trained) if trained.isdecimal() else 0,
        frozen=int(frozen) if frozen.isdecimal() else 0,
        weights=parameters.get("model.weights", ""),
        weights_sha256=parameters.get("weights.sha256", ""),
        normalization=parameters.get("weights.normalization", ""),
    )


def _ridge(metrics: Mapping[str, float]) -> RidgeResult | None:
    """The linear baseline, if all its metrics have arrived in MLflow."""
    try:
        return RidgeResult(
            correct=int(metrics["ridge/valid_correct"]),
            total=int(metrics["ridge/valid_total"]),
            penalty=metrics["ridge/penalty"],
            seconds=metrics["ridge/seconds"],
        )
    except KeyError:
        return None


def _epochs(run: StoredRun) -> tuple[EpochRecord, ...]:
    """The epochs of which all metrics have arrived in MLflow."""
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
        )
        for epoch in complete
    )


def _pictures(run: StoredRun) -> tuple[tuple[FigureFile, ...], tuple[str, ...]]:
    """The figures among the artifacts, and a line for each that is not taken."""
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
