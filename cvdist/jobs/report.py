"""A run's `report.html`, from what MLflow has about the run and nothing else."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cvdist import config as configs
from cvdist import log, recipes
from cvdist.config import ReportConfig
from cvdist.errors import UserError
from cvdist.report_html import figures
from cvdist.report_html.content import DataSummary, FigureFile, ModelSummary, Report, Setting
from cvdist.report_html.embed import TYPES
from cvdist.report_html.page import render
from cvdist.results import EpochRecord, RidgeResult
from cvdist.tracking.find import find_run
from cvdist.tracking.run import FIRST_STEP, RunRef, first_line, mlflow_client, short_retries

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

NAME = "report.html"

_FIGURES = "figures"
_QUARANTINE = "quarantine.csv"
_REQUEST_SECONDS = 30.0
_ALL_SECONDS = 120.0
_LARGEST_FILE = 100 * 2**20  # of one figure
_DEEPEST = 3  # folders below `figures`
# Tags that `cvdist.tracking.environment` sets, by what the report calls them.
_PLACES = {
    "mlflow.source.git.commit": "Commit",
    "host.name": "Host",
    "host.os": "System",
    "ray.job_id": "Ray job",
}


def build(tracking_uri: str, run_id: str, *, ended: bool = False) -> str:
    """The page of a run. `ended`: its owner is about to end it, and nothing went wrong."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with short_retries(_REQUEST_SECONDS):
        return render(_content(mlflow_client(tracking_uri), run_id, ended))


def log_report(ref: RunRef, *, ended: bool = False) -> None:
    """Put the page among the run's artifacts."""
    page = build(ref.tracking_uri, ref.run_id, ended=ended)
    with short_retries(_REQUEST_SECONDS):
        mlflow_client(ref.tracking_uri).log_text(ref.run_id, page, NAME)


def log_report_or_warn(ref: RunRef, *, ended: bool = True) -> None:
    """The same at a job's end: the job's result stands, whatever becomes of its report."""
    try:
        log_report(ref, ended=ended)
    except Exception as error:  # see above
        logger.warning("no %s: %s; python jobs/report.py %s makes it", NAME, first_line(error), ref.run_id)
        logger.debug("", exc_info=True)


def make(run: str, settings: ReportConfig) -> str:
    """The page of the run with this id or name, anew; returns lines for whoever has asked for it.

    Raises:
        UserError: if there is no such run or store, or the file can't be written.
    """
    config = configs.replace(
        configs.TrainConfig(),
        storage=settings.storage,
        tracking_uri=settings.tracking_uri,
        experiment=settings.experiment,
        tracking_timeout=settings.tracking_timeout,
    )
    ref = find_run(config, run)
    if not settings.output:
        log_report(ref)
        return f"{NAME} is among the artifacts of the run {ref.run_id}\nnext: open {ref.page}/artifacts/{NAME}"
    path = Path(settings.output)
    page = build(ref.tracking_uri, ref.run_id)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror}") from error
    return f"{path}: {len(page.encode()) / 1e6:.1f} MB\nnext: open it in a browser, or send it to someone"


def _content(client: MlflowClient, run_id: str, ended: bool) -> Report:
    run = client.get_run(run_id)
    parameters = _parameters(run)
    first_step = run.data.metrics.get(FIRST_STEP)
    tags = run.data.tags
    pictures, left_out = _pictures(client, run_id)
    world_size = parameters.get("run.world_size", "")
    settings, facts = _settings(parameters)
    return Report(
        name=run.info.run_name or run_id,
        status="" if ended or run.info.status == "FINISHED" else run.info.status.lower(),
        recipe=parameters.get("recipe", ""),
        command=tags.get("cvdist.command", ""),
        started=_date(run.info.start_time),
        address=_address(run),
        data=_data(run, parameters),
        model=_model(parameters),
        workers=int(world_size) if world_size.isdecimal() else 0,
        hardware=parameters.get("run.hardware", ""),
        precision=parameters.get("run.precision", ""),
        epochs=_epochs(client, run_id),
        first_step_seconds=first_step,
        ridge=_ridge(run.data.metrics),
        settings=settings,
        facts=facts,
        versions=tuple(
            [("cvdist", tags[key]) for key in ("cvdist.version",) if key in tags]
            + [(key.partition(".")[2], tags[key]) for key in sorted(tags) if key.startswith("version.")]
        ),
        quarantine=_quarantine(client, run_id),
        pictures=pictures,
        left_out=left_out,
    )


def _date(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _address(run: Run) -> tuple[tuple[str, str], ...]:
    tags = run.data.tags
    places = [(name, tags[key]) for key, name in _PLACES.items() if tags.get(key)]
    return (*places, ("MLflow run", run.info.run_id))


def _parameters(run: Run) -> dict[str, str]:
    """As they are now: a continued run keeps what it was continued with in tags."""
    changed = {
        key.removeprefix("changed."): value
        for key, value in run.data.tags.items()
        if key.startswith("changed.")
    }
    return {**run.data.params, **changed}


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
    usual["checkpoint.name"] = parameters.get("checkpoint.name", "")
    settings = tuple(
        Setting(group, field, parameters[name], usual.get(name) if len(usual) > 1 else None)
        for name in order
        if name in parameters
        for group, _, field in [name.partition(".")]
    )
    rest = sorted(set(parameters) - set(order) - {"recipe"})
    return settings, tuple((name, parameters[name]) for name in rest)


def _data(run: Run, parameters: Mapping[str, str]) -> DataSummary | None:
    inputs = run.inputs.dataset_inputs if run.inputs else []
    if not inputs:
        return None
    dataset = inputs[0].dataset
    profile, schema = _json(dataset.profile), _json(dataset.schema)
    features = str(schema.get("mlflow_tensorspec", {}).get("features", ""))
    return DataSummary(
        name=dataset.name,
        source=str(_json(dataset.source).get("uri", "")),
        shape=features.removeprefix("uint8 "),
        classes=tuple(map(str, profile.get("classes", ()))),
        train_size=int(profile.get("train", 0)),
        valid_size=int(profile.get("valid", 0)),
        sha256=parameters.get("data.sha256", dataset.digest),
    )


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _model(parameters: Mapping[str, str]) -> ModelSummary | None:
    name = parameters.get("model.model", "")
    if not name:
        return None
    trained, frozen = (parameters.get(f"run.{which}", "0") for which in ("parameters", "frozen_parameters"))
    return ModelSummary(
        name=name,
        trained=int(trained) if trained.isdecimal() else 0,
        frozen=int(frozen) if frozen.isdecimal() else 0,
        weights=parameters.get("model.weights", ""),
        weights_sha256=parameters.get("weights.sha256", ""),
        normalization=parameters.get("weights.normalisation", ""),
    )


def _ridge(metrics: Mapping[str, float]) -> RidgeResult | None:
    """The baseline, if it has arrived whole."""
    try:
        return RidgeResult(
            correct=int(metrics["ridge/valid_correct"]),
            total=int(metrics["ridge/valid_total"]),
            penalty=metrics["ridge/penalty"],
            seconds=metrics["ridge/seconds"],
        )
    except KeyError:
        return None


def _epochs(client: MlflowClient, run_id: str) -> tuple[EpochRecord, ...]:
    """The epochs of which all results have arrived."""

    def history(name: str) -> dict[int, float]:
        points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp)
        return {point.step: point.value for point in points}

    needed = {
        name: history(name)
        for name in (
            *(f"{phase}/{what}" for phase in ("train", "valid") for what in ("loss", "correct", "total")),
            "train/learning_rate",
            "speed/epoch_seconds",
            "speed/samples_per_second",
        )
    }
    memory = history("memory/peak_mb")
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


def _pictures(client: MlflowClient, run_id: str) -> tuple[tuple[FigureFile, ...], tuple[str, ...]]:
    """The figures among the artifacts, and a line for each that is not taken."""
    found = _list_figures(client, run_id, _FIGURES, _DEEPEST)
    sizes = {str(PurePosixPath(path).relative_to(_FIGURES)): size for path, size in found.items()}
    paths, left_out = figures.select_figures(
        [path for path in sizes if PurePosixPath(path).suffix.lower() in TYPES]
    )
    pictures = []
    deadline = time.monotonic() + _ALL_SECONDS
    with tempfile.TemporaryDirectory(prefix="cvdist-report-") as folder:
        for path in paths:
            where = f"{_FIGURES}/{path}"
            if sizes[path] > _LARGEST_FILE:
                left_out.append(f"{where}, {sizes[path] / 1e6:,.0f} MB")
                continue
            if time.monotonic() > deadline:
                left_out.append(f"{where}: the MLflow server took more than {_ALL_SECONDS:g} s for the others")
                continue
            try:
                file = Path(client.download_artifacts(run_id, where, folder))
                pictures.append(FigureFile(path, file.read_bytes()))
                file.unlink()
            except Exception as error:  # one picture less is still a report
                left_out.append(f"{where} could not be fetched: {first_line(error)}")
    return tuple(pictures), tuple(left_out)


def _list_figures(client: MlflowClient, run_id: str, folder: str, depth: int) -> dict[str, int]:
    """Path and bytes of each file."""
    files = {}
    for entry in client.list_artifacts(run_id, folder):
        if not entry.is_dir:
            files[entry.path] = int(entry.file_size or 0)
        elif depth > 1:
            files |= _list_figures(client, run_id, entry.path, depth - 1)
    return files


def _quarantine(client: MlflowClient, run_id: str) -> tuple[tuple[str, str], ...]:
    if all(entry.path != _QUARANTINE for entry in client.list_artifacts(run_id)):
        return ()
    with tempfile.TemporaryDirectory(prefix="cvdist-report-") as folder:
        text = Path(client.download_artifacts(run_id, _QUARANTINE, folder)).read_text(errors="replace")
    rows = list(csv.reader(io.StringIO(text)))[1:]
    return tuple((row[0], row[1]) for row in rows if len(row) > 1)
