"""MLflow: one run for one training job, filled by one process, off the training's path."""

from __future__ import annotations

from cvdist.tracking.run import (
    PARENT_TAG,
    RunRef,
    TrackingStore,
    set_description,
    end_children,
    ended,
    log_file,
    open_store,
    require_server,
    set_status,
    start_run,
    wait_for_server,
)
from cvdist.tracking.tracker import Attempt, NoTracker, Tracker

__all__ = [
    "PARENT_TAG",
    "Attempt",
    "NoTracker",
    "RunRef",
    "TrackingStore",
    "Tracker",
    "describe",
    "end_children",
    "ended",
    "log_file",
    "open_store",
    "open_tracker",
    "require_server",
    "set_status",
    "start_run",
    "wait_for_server",
]


def open_tracker(
    ref: RunRef | None, rank: int, local_rank: int, node: str, attempt: Attempt | None = None
) -> Tracker:
    """What worker `rank` reports to: rank 0 fills the run, one worker of each node its system metrics."""
    if ref is None:
        return NoTracker()
    # Imported here: the worker that logs is the only one to pay for it.
    from cvdist.tracking.mlflow_tracker import MlflowTracker, SystemMetricsTracker

    if rank == 0:
        return MlflowTracker(ref, node, attempt)
    if local_rank == 0 and ref.system_metrics:
        return SystemMetricsTracker(ref, node)
    return NoTracker()
