"""MLflow tracking: one run for each job, written by one process in a background thread."""

from __future__ import annotations

from cvdist.tracking.run import (
    PARENT_TAG,
    RunRef,
    TrackingStore,
    check_tracking_store,
    create_run,
    end_children,
    end_run_on_exit,
    link_model,
    log_file,
    open_tracking_store,
    require_server,
    set_description,
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
    "Tracker",
    "TrackingStore",
    "check_tracking_store",
    "create_run",
    "end_children",
    "end_run_on_exit",
    "link_model",
    "log_file",
    "open_tracker",
    "open_tracking_store",
    "require_server",
    "set_description",
    "set_status",
    "start_run",
    "wait_for_server",
]


def open_tracker(
    ref: RunRef | None, rank: int, local_rank: int, node: str, attempt: Attempt | None = None
) -> Tracker:
    """Create the tracker of a worker.

    Rank 0 logs everything. One worker of each other node logs the system metrics of its node.

    Args:
        ref: The run; None without tracking.
        rank: Rank of the worker.
        local_rank: Rank of the worker among those of its node.
        node: Name of the node, for its system metrics.
        attempt: The current attempt of the run.
    """
    if ref is None:
        return NoTracker()
    # Imported here, so that only workers that log load it.
    from cvdist.tracking.mlflow_tracker import MlflowTracker, SystemMetricsTracker

    if rank == 0:
        return MlflowTracker(ref, node, attempt)
    if local_rank == 0 and ref.system_metrics:
        return SystemMetricsTracker(ref, node)
    return NoTracker()
