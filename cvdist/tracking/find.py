"""Finding a run by what its user calls it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvdist.config import TrainConfig
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking import environment
from cvdist.tracking.run import NAME_TAG, RunRef, client_of, first_line, require_answer, short_retries, uri_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


def find_run(config: TrainConfig, run: str) -> RunRef:
    """The run with the id `run` or, in the experiment, of this name; of several the newest.

    Raises:
        UserError: if there is none, with the nearest names, or no store.
    """
    if not environment.installed("mlflow"):
        raise UserError("MLflow is not installed: pip install mlflow")
    uri, timeout = uri_of(config), config.tracking.tracking_timeout
    if uri.startswith("http"):
        require_answer(uri, timeout, "")
    elif uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"there is no MLflow store {redact(uri)}: name it with --tracking-uri or --storage")
    try:
        with short_retries(timeout):
            found = _look_up(client_of(uri), config.tracking.experiment, run)
    except UserError:
        raise
    except Exception as error:  # see `open_store`
        raise UserError(f"the MLflow store {redact(uri)} refused: {first_line(error)}") from error
    return RunRef(uri, found.experiment_id, found.run_id, system_metrics=False, log_model=False)


def _look_up(client: MlflowClient, experiment: str, run: str) -> Any:
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            return client.get_run(run).info
        except MlflowException:
            raise UserError(f"no run has the id {run}") from None
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise UserError(f"there is no experiment {experiment!r}: name it with --experiment")
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1000)
    for one in runs:
        if run in (one.data.tags.get(NAME_TAG), one.info.run_name):
            return one.info
    near = difflib.get_close_matches(run, [str(one.info.run_name) for one in runs], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "--experiment names another one"
    raise UserError(f"no run in the experiment {experiment!r} is called {run!r}: {hint}")
