"""A sweep in MLflow: one run for all of it, and one below it for each trial."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Container, Mapping, Sequence
from typing import Any

from cvdist import config as configs
from cvdist import log
from cvdist.config import SweepJobConfig, TrainConfig
from cvdist.sweep import importance, space
from cvdist.sweep.record import Trial, best_of, folder_of
from cvdist.sweep.space import Dimension
from cvdist.tracking import environment, open_tracker
from cvdist.tracking.run import (
    PARENT_TAG,
    RunRef,
    TrackingStore,
    end_run,
    log_params,
    mlflow_client,
    set_description,
    set_status,
    start_run,
)

_STATE_TAG = "cvdist.trial_state"
_SHOWN = 30  # trials in the description
_FIGURES = {
    "parallel_coordinates": "which settings lead where",
    "importance": "which of them matter",
    "trials": "accuracy by epoch, and where trials were stopped",
}


def start(
    job: SweepJobConfig, search: Sequence[Dimension], store: TrackingStore, *, continued: bool, owner: str
) -> RunRef:
    """The run of the sweep, as `start_run`, with its own settings among the parameters."""
    ref = start_run(job.train, store, continued=continued, job=owner, tags={"cvdist.kind": "sweep"})
    values = {f"sweep.{name}": value for name, value in dataclasses.asdict(job.sweep).items()}
    values["sweep.search"] = " ".join(map(str, search))
    log_params(mlflow_client(ref.tracking_uri), ref.run_id, values)
    return dataclasses.replace(ref, system_metrics=False, log_model=False)


def start_trials(
    base: TrainConfig, trials: Sequence[Trial], parent: RunRef, folder: str, *, continued: bool
) -> dict[int, RunRef]:
    """A run for each trial, which waits. folder: of the sweep."""
    store = TrackingStore(parent.tracking_uri, parent.experiment_id)
    refs = {}
    for trial in trials:
        config = space.apply_settings(base, trial.settings)
        name = f"{base.checkpoint.name}-{folder_of(trial.number)}"
        ref = start_run(
            configs.replace(config, name=name),
            store,
            continued=continued,
            job=parent.job,
            tags={PARENT_TAG: parent.run_id, "cvdist.kind": "trial", _STATE_TAG: "waiting"},
            status="SCHEDULED",
        )
        refs[trial.number] = dataclasses.replace(
            ref, folder=f"{folder}/{folder_of(trial.number)}", system_metrics=False, log_model=False
        )
    return refs


def running(ref: RunRef) -> None:
    """Show a trial as running."""
    set_status(ref, "RUNNING", {_STATE_TAG: "running"})


def end_trial(ref: RunRef, trial: Trial) -> None:
    """End a trial's run."""
    lost = trial.state in ("diverged", "failed")
    tags = {_STATE_TAG: trial.state, **({"cvdist.reason": log.redact(trial.reason)[:5000]} if lost else {})}
    set_status(ref, "RUNNING", tags)
    end_run(ref.tracking_uri, ref.run_id, "FAILED" if lost else "FINISHED", ref.job)


def log_results(ref: RunRef, search: Sequence[Dimension], trials: Sequence[Trial], grace: int) -> None:
    """Table, figures, numbers and description. grace: epochs that every trial was trained for."""
    tracker = open_tracker(ref, 0, 0, "")
    best = best_of(trials)
    values = {f"trials/{state}": sum(t.state == state for t in trials) for state in ("finished", "stopped")}
    values["trials/lost"] = sum(trial.state in ("diverged", "failed") for trial in trials)
    values["trials/epochs"] = sum(len(trial.epochs) for trial in trials)
    numbers: dict[str, float] = dict(values)
    if best is not None and best.best is not None:
        numbers |= {
            "best/correct": best.best.correct,
            "best/total": best.best.total,
            "best/accuracy": best.best.correct / best.best.total,
            "best/trial": best.number,
        }
    tracker.log_metrics(numbers, step=0)
    tracker.log_text("trials.csv", table(search, trials))
    drawn = figures(search, trials, grace)
    for name, draw in drawn.items():
        tracker.log_figure(name, draw)
    tracker.close()
    set_description(ref, description(search, trials, environment.command(), set(drawn)))


def figures(search: Sequence[Dimension], trials: Sequence[Trial], grace: int) -> Mapping[str, Any]:
    """What draws each figure."""
    shares = importance.permutation_importance(search, trials, grace)

    def parallel() -> Any:
        from cvdist.figures import sweep

        return sweep.parallel_coordinates(search, trials)

    def bars() -> Any:
        from cvdist.figures import sweep

        assert shares is not None
        return sweep.importance_bars(shares)

    def curves() -> Any:
        from cvdist.figures import sweep

        return sweep.trial_curves(trials)

    drawn = {"parallel_coordinates": parallel, "trials": curves}
    return {**drawn, "importance": bars} if shares is not None else drawn


def table(search: Sequence[Dimension], trials: Sequence[Trial]) -> str:
    """All trials as CSV, in the order of their numbers."""
    output = io.StringIO()
    writer = csv.writer(output)
    names = [dimension.name for dimension in search]
    results = ["correct", "total", "accuracy", "valid_loss", "best_epoch", "epochs", "seconds", "reason"]
    writer.writerow(["trial", "state", *names, *results])
    for trial in trials:
        best = trial.best
        measured = ["", "", "", "", ""]
        if best is not None:
            accuracy = f"{best.correct / best.total:.6f}"
            measured = [str(best.correct), str(best.total), accuracy, f"{best.loss:.6f}", str(best.epoch)]
        settings = [
            space.format_value(trial.settings[name]) if name in trial.settings else "" for name in names
        ]
        ends = [len(trial.epochs), f"{trial.seconds:.1f}", log.redact(trial.reason)]
        writer.writerow([trial.number, trial.state, *settings, *measured, *ends])
    return output.getvalue()


def description(
    search: Sequence[Dimension], trials: Sequence[Trial], command: str, drawn: Container[str]
) -> str:
    """Markdown for the top of the run's page. drawn: names of the figures."""
    shown = "\n".join(f"- `figures/{name}.png`: {what}" for name, what in _FIGURES.items() if name in drawn)
    best = best_of(trials)
    title = "no trial has finished"
    if best is not None and best.best is not None:
        title = f"{log.percent(best.best.correct, best.best.total)} by trial {best.number}"
    names = [dimension.name for dimension in search]
    header = ["trial", *(dimension.flag for dimension in search), "accuracy", "epochs", "state"]
    rows = [header, ["---"] * len(header)]
    ranked = sorted(trials, key=lambda trial: (trial is not best, -trial.score, trial.number))
    for trial in ranked[:_SHOWN]:
        result = log.percent(trial.best.correct, trial.best.total) if trial.best is not None else ""
        settings = [
            space.format_value(trial.settings[name]) if name in trial.settings else "" for name in names
        ]
        rows.append([str(trial.number), *settings, result, str(len(trial.epochs)), trial.state])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    more = f"\n\nand {len(trials) - _SHOWN} more in `trials.csv`" if len(trials) > _SHOWN else ""
    return f"""### {title}

`{command}`

{lines}{more}

Artifacts:
- `trials.csv`: all trials, with their settings and exact counts
{shown}

Each trial is a run below this one; the best, trained on, has figures, a report and a model.
"""
