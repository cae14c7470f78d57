"""Deliver the metrics that a job kept in a journal while MLflow was away."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

from cvdist import storage
from cvdist.config import ReplayConfig
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking import journal
from cvdist.tracking.run import first_line, mlflow_client, require_server


@dataclass(frozen=True)
class ReplayResult:
    """How many values were delivered to which run, and whether the run was marked as finished."""

    run_id: str
    values: int
    ended: bool


def replay(config: ReplayConfig) -> ReplayResult:
    """Deliver a journal to MLflow, in order, without the values that the run has already.

    It goes to the store at $MLFLOW_TRACKING_URI, else to the job's own.

    Raises:
        UserError: if the journal can't be read, or MLflow does not take it.
    """
    uri = config.replay.journal
    folder, slash, name = uri.rpartition("/")
    content = storage.Folder.open(folder or slash or ".", "the journal").read(name)
    kept = journal.parse(content.decode(errors="replace"), PurePosixPath(name).name)
    where = os.environ.get("MLFLOW_TRACKING_URI", "") or kept.tracking_uri
    if "***@" in where:
        raise UserError("the MLflow store needs a user and a password: name it with MLFLOW_TRACKING_URI")
    if where.startswith("http"):
        require_server(where, 10.0, "")
    try:
        client = mlflow_client(where)
        journal.MetricDelivery(kept.run_id).deliver(client, kept.metrics)
        ended = kept.finished and client.get_run(kept.run_id).info.status != "FINISHED"
        if ended:
            client.set_terminated(kept.run_id, "FINISHED")
    except Exception as error:  # a database, a proxy, a permission: MLflow passes on whatever it meets
        raise UserError(f"the MLflow store {redact(where)} does not take it: {first_line(error)}") from error
    return ReplayResult(kept.run_id, sum(len(item.values) for item in kept.metrics), ended)


def table(result: ReplayResult) -> str:
    """Format the line that says what was delivered."""
    ended = ", and is marked as finished" if result.ended else ""
    return f"run {result.run_id} has all {result.values} values of the journal{ended}"
