"""Find a run by its id or name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvdist.config import LookupConfig
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking import environment
from cvdist.tracking.run import (
    NAME_TAG,
    RunRef,
    first_line,
    mlflow_client,
    require_server,
    short_retries,
    tracking_uri_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


def find_run(lookup: LookupConfig, run: str) -> RunRef:
    """Find the run with the id `run`, or the newest run of this name in the experiment.

    Raises:
        UserError: If there is no such run or no store. The message names the most similar names.
    """
    if not environment.is_installed("mlflow"):
        raise UserError("MLflow is not installed: pip install mlflow")
    uri, timeout = tracking_uri_of(lookup.tracking_uri, lookup.storage), lookup.tracking_timeout
    if uri.startswith("http"):
        require_server(uri, timeout, "")
    elif uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"there is no MLflow store {redact(uri)}: name it with --tracking-uri or --storage")
    try:
        with short_retries(timeout):
            found = look_up_run(mlflow_client(uri), lookup.experiment, run)
    except UserError:
        raise
    except Exception as error:  # of any type, as in `open_tracking_store`
        raise UserError(f"the MLflow store {redact(uri)} refused: {first_line(error)}") from error
    if found is None:
        raise UserError(f"no run has the id {run}: --tracking-uri or MLFLOW_TRACKING_URI names another store")
    return RunRef(uri, found.info.experiment_id, found.info.run_id, system_metrics=False, log_model=False)


def look_up_run(client: MlflowClient, experiment: str, word: str) -> Any:
    """Find the MLflow run with the id `word`, or the newest run of this name in the experiment.

    Returns:
        The run, or None if no run has this id.

    Raises:
        UserError: If there is no such experiment, or no run of this name in it. The message names similar
            names.
    """
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", word):
        try:
            return client.get_run(word)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
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
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the newest are {', '.join(names[:3]) or 'none'}"
    raise UserError(f"no run in the experiment {experiment!r} is called {word!r}: {hint}")
