"""Find a run by its id or name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cvdist.config import LookupConfig
from cvdist.errors import UserError, did_you_mean
from cvdist.tracking.run import (
    NAME_TAG,
    RunRef,
    reached_store,
    sqlite_path,
    tracking_uri_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextmanager
def existing_store(lookup: LookupConfig, prefix: str = "") -> Iterator[tuple[str, MlflowClient]]:
    """Open the store of existing runs and models. Errors of any type are a `UserError` that names the store.

    Args:
        lookup: Names the store.
        prefix: Beginning of the message if there is no store.

    Yields:
        The store's address, and a client with short timeouts.
    """
    uri = tracking_uri_of(lookup.tracking_uri, lookup.storage)
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise UserError(
            f"{prefix}there is no MLflow store {path}: set --storage or CVDIST_STORAGE to the folder of the "
            "runs, or --tracking-uri or MLFLOW_TRACKING_URI to the store"
        )
    with reached_store(uri, lookup.tracking_timeout, prefix=prefix) as client:
        yield uri, client


def find_run(lookup: LookupConfig, run: str) -> RunRef:
    """Find the run with the id `run`, or the newest run of this name in the experiment.

    Raises:
        UserError: If there is no such run or no store. The message names the most similar names.
    """
    with existing_store(lookup) as (uri, client):
        found = look_up_run(client, lookup.experiment, run)
    return RunRef(uri, found.info.experiment_id, found.info.run_id)


def look_up_run(client: MlflowClient, experiment: str, word: str) -> Any:
    """Find the MLflow run with the id `word`, or the newest run of this name in the experiment.

    Raises:
        UserError: If there is no such experiment or run. The message names similar names.
    """
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", word):
        try:
            return client.get_run(word)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"no run has the id {word}: --tracking-uri or MLFLOW_TRACKING_URI names another store"
            ) from error
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = ", ".join(sorted(one.name for one in client.search_experiments(max_results=20)))
        raise UserError(
            f"there is no experiment {experiment!r} that could contain the run {word!r}: --experiment takes "
            f"one of {known}"
        )
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1000)
    for run in runs:
        if word in (run.data.tags.get(NAME_TAG), run.info.run_name):
            return run
    names = [str(run.data.tags.get(NAME_TAG) or run.info.run_name) for run in runs]
    hint = did_you_mean(word, names, f"the newest are {', '.join(names[:3]) or 'none'}")
    raise UserError(f"no run in the experiment {experiment!r} is called {word!r}: {hint}")
