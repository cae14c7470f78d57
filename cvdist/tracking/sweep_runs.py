"""The MLflow runs of a sweep: one for the sweep, and below it one for each trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cvdist import config as configs
from cvdist import log
from cvdist.config import SweepJobConfig, TrainConfig
from cvdist.sweep import space
from cvdist.sweep.record import Trial, folder_of
from cvdist.sweep.space import Dimension
from cvdist.tracking.run import (
    PARENT_TAG,
    RunRef,
    TrackingStore,
    end_run,
    log_params,
    mlflow_client,
    set_status,
    start_run,
)

_STATE_TAG = "cvdist.trial_state"


def start_sweep(
    job: SweepJobConfig, search: Sequence[Dimension], store: TrackingStore, *, continued: bool, owner: str
) -> RunRef:
    """Start the run of a sweep like `start_run`, with the sweep's settings among the parameters."""
    ref = start_run(job.train, store, continued=continued, job=owner, tags={"cvdist.kind": "sweep"})
    values = {f"sweep.{name}": value for name, value in dataclasses.asdict(job.sweep).items()}
    values["sweep.search"] = " ".join(map(str, search))
    log_params(mlflow_client(ref.tracking_uri), ref.run_id, values)
    return dataclasses.replace(ref, system_metrics=False, log_model=False)


def start_trials(
    base: TrainConfig, trials: Sequence[Trial], parent: RunRef, folder: str, *, continued: bool
) -> dict[int, RunRef]:
    """Create a run for each trial, with the status of one that waits. folder: the sweep's."""
    store = TrackingStore(parent.tracking_uri, parent.experiment_id)
    refs = {}
    for trial in trials:
        config = space.apply_settings(base, trial.settings)
        name = f"{base.run.name}-{folder_of(trial.number)}"
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


def show_running(ref: RunRef) -> None:
    """Show a trial as running."""
    set_status(ref, "RUNNING", {_STATE_TAG: "running"})


def end_trial(ref: RunRef, trial: Trial) -> None:
    """End a trial's run."""
    lost = trial.state in ("diverged", "failed")
    tags = {_STATE_TAG: trial.state, **({"cvdist.reason": log.redact(trial.reason)[:5000]} if lost else {})}
    set_status(ref, "RUNNING", tags)
    end_run(ref.tracking_uri, ref.run_id, "FAILED" if lost else "FINISHED", ref.job)
