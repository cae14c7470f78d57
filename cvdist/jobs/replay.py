"""What a job could not deliver while MLflow was away, delivered from its journal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

from cvdist import storage
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking import journal
from cvdist.tracking.run import first_line, mlflow_client, require_server


@dataclass(frozen=True)
class Replayed:
    """What was delivered: values, of the run. ended: whether the run could be marked finished."""

    run_id: str
    values: int
    ended: bool


def replay(uri: str, tracking_uri: str = "") -> Replayed:
    """Deliver the journal at `uri`, a file or an object, in order; what the run has already is left out.

    tracking_uri: of the MLflow store; empty: $MLFLOW_TRACKING_URI, else the job's own.

    Raises:
        UserError: if the journal can't be read, or MLflow does not take it.
    """
    folder, slash, name = uri.rpartition("/")
    content = storage.Folder.open(folder or slash or ".", "the journal").read(name)
    kept = journal.parse(content.decode(errors="replace"), PurePosixPath(name).name)
    where = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "") or kept.tracking_uri
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
    return Replayed(kept.run_id, sum(len(item.values) for item in kept.metrics), ended)
