"""Start and end the MLflow run of a job. The process that starts a job owns its run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from cvdist import config as configs
from cvdist.config import TrackingConfig, TrainConfig, cache_folder, storage_root
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

OR_NONE = ", or do without: --tracking none"  # at the end of a message
FIRST_STEP = "speed/seconds_to_first_step"
NAME_TAG, JOB_TAG = "cvdist.name", "cvdist.job"
PARENT_TAG = "mlflow.parentRunId"
_SQLITE = "sqlite:///"
_UPLOAD_SECONDS = 60.0
RETRY_SECONDS = 1.0  # between two attempts to reach a server
_PARAMS_PER_CALL = 100  # limit of MLflow
_TRAINING_VIEW = "?workflowType=machine_learning"  # else the UI may show its view of chats
_VIEW = "cvdist"
# A view of the table of runs, in the form in which the UI stores one that somebody shares. It leaves out
# columns that no run has.
_RUNS_VIEW = {
    "orderByKey": "metrics.`valid/accuracy`",
    "orderByAsc": False,
    "selectedColumns": [
        *("attributes.`Dataset`", "attributes.`Models`", "metrics.`valid/mean_average_precision`"),
        *("metrics.`valid/accuracy`", "metrics.`valid/loss`", "params.`model.name`", "params.`loop.epochs`"),
    ],
}


@dataclass(frozen=True)
class RunRef:
    """A reference to a run, with which any process can log to it.

    Attributes:
        tracking_uri: Address of the tracking store.
        experiment_id: Id of the experiment.
        run_id: Id of the run.
        system_metrics: Whether to log system metrics.
        log_model: Whether to log the best model.
        job: Id of the job that owns the run (`cvdist.checkpoints.fence`).
        folder: Folder or URI of the run's checkpoints.
        journal: File on each node for metrics that could not be delivered.
        drain_timeout: Seconds that a finished job waits for a server that is unreachable.
    """

    tracking_uri: str
    experiment_id: str
    run_id: str
    system_metrics: bool = False
    log_model: bool = False
    job: str = ""
    folder: str = ""
    journal: str = ""
    drain_timeout: float = TrackingConfig.drain_timeout

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for another process, which calls `RunRef(**values)`."""
        return dataclasses.asdict(self)

    def page(self, tab: str = "") -> str:
        """Return the address of the run in the MLflow UI, with a tab such as `/artifacts`.

        Without a server, it is only the part from `#` on.
        """
        return self._address(f"/{self.run_id}{tab}")

    def runs_page(self) -> str:
        """Return the address of the table of all runs in the MLflow UI, the most accurate first."""
        return self._address("", f"&viewStateShareKey={_VIEW}")

    def _address(self, path: str, more: str = "") -> str:
        at = f"#/experiments/{self.experiment_id}/runs{path}{_TRAINING_VIEW}{more}"
        return f"{redact(self.tracking_uri)}/{at}" if self.tracking_uri.startswith("http") else at

    def require_reachable_from(self, nodes: int) -> None:
        """Check that all nodes of a cluster can reach the store.

        Raises:
            UserError: If the store is a file and the cluster has several nodes.
        """
        if nodes > 1 and not self.tracking_uri.startswith("http"):
            raise UserError(
                f"the MLflow store {redact(self.tracking_uri)} is a file of this machine and the cluster has "
                f"{nodes} nodes: name a server with --tracking-uri or MLFLOW_TRACKING_URI"
            )


@dataclass(frozen=True)
class TrackingStore:
    """A tracking store that was reached, and an experiment in it."""

    tracking_uri: str
    experiment_id: str


def mlflow_client(tracking_uri: str) -> MlflowClient:
    """Create an MLflow client. The first call imports MLflow."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # otherwise a container without git causes a warning
    # The tracker retries what is not delivered, in order; the retries of MLflow would take minutes per call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the job prints the address itself
    from mlflow import MlflowClient

    if not tracking_uri.startswith("http"):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # in place of ten attempts, 102 s, to open a file that isn't there
    for noisy in ("mlflow", "alembic"):  # after the import, which configures the logging of MLflow
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri)


@contextmanager
def default_store(tracking_uri: str) -> Iterator[None]:
    """Set the store for functions of MLflow that take no address, for the duration of the context."""
    import mlflow

    variable = os.environ.get("MLFLOW_TRACKING_URI")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # `set_tracking_uri` has set it


def open_tracking_store(settings: TrackingConfig, storage: str) -> TrackingStore | None:
    """Connect to the tracking store, and create the experiment if it does not exist.

    Args:
        settings: Name the store and the experiment, and say whether they are needed.
        storage: The value of `RunConfig.storage`. It has the store if none is named.

    Returns:
        The store. None with `--tracking none`, or if the store can't be reached with `--tracking optional`.

    Raises:
        UserError: If the store can't be reached within `--tracking-timeout`, or can't be written.
    """
    if settings.mode == "none":
        return None
    try:
        return _open_tracking_store(settings, storage)
    except UserError as error:
        if settings.mode != "optional":
            raise
        logger.warning("this job goes on without MLflow (--tracking optional): %s", error)
        return None


def _open_tracking_store(settings: TrackingConfig, storage: str) -> TrackingStore:
    uri = tracking_uri_of(settings.uri, storage)
    with reached_store(uri, settings.timeout, otherwise=OR_NONE) as client:
        database = sqlite_path(uri)
        artifacts = _create_sqlite_folder(database) if database is not None else None
        return TrackingStore(uri, _experiment(client, uri, settings.experiment, artifacts))


@contextmanager
def reached_store(uri: str, timeout: float, *, prefix: str = "", otherwise: str = "") -> Iterator[MlflowClient]:
    """Yield a client with short timeouts. Errors of any type are a `UserError` that names the store.

    Args:
        uri: Address of the store.
        timeout: Seconds for one answer.
        prefix: Beginning of the message if MLflow is not installed.
        otherwise: End of the messages, which names an alternative.

    Raises:
        UserError: If the store can't be reached.
    """
    if not environment.is_installed("mlflow"):
        raise UserError(f"{prefix}MLflow is not installed: pip install mlflow{otherwise}")
    if uri.startswith("http"):
        require_server(uri, timeout, otherwise)
    try:
        with short_retries(timeout):
            yield mlflow_client(uri)
    except UserError:
        raise
    except Exception as error:  # MLflow passes on errors of databases, proxies and permissions of any type
        other = "name another one with --tracking-uri"
        other = other + otherwise if otherwise else f"or {other}"
        raise UserError(
            f"the MLflow store {redact(uri)} refused: {first_line(error)}. Repair it, {other}"
        ) from error


def check_tracking_store(settings: TrackingConfig, storage: str) -> None:
    """Check what can be checked of the store without the seconds that MLflow takes to import.

    The arguments are those of `open_tracking_store`.

    Raises:
        UserError: If the store is required and no server answers, or there is no store to use.
    """
    if settings.mode == "required" and (uri := tracking_uri_of(settings.uri, storage)).startswith("http"):
        require_server(uri, settings.timeout)


def start_run(
    config: TrainConfig,
    store: TrackingStore,
    *,
    continued: bool,
    job: str = "",
    tags: Mapping[str, str] | None = None,
    status: str = "RUNNING",
) -> RunRef:
    """Start the run of a job, or reopen the run of the job that this one resumes.

    Logs all settings and the environment of the job.

    Args:
        config: The settings of the job.
        store: The tracking store.
        continued: Whether the job resumes an earlier one of the same name.
        job: Id of the job, which owns the run from now on: no other job ends it.
        tags: Additional tags of the run.
        status: Status of the run.

    Returns:
        A reference to the run.
    """
    client = mlflow_client(store.tracking_uri)
    name = config.run.name
    run = _find(client, store.experiment_id, name) if continued else None
    if run is None:
        first = {NAME_TAG: name, "cvdist.recipe": config.recipe, **(tags or {})}
        run = client.create_run(store.experiment_id, run_name=name, tags=first)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    if status != "RUNNING":
        client.update_run(run.info.run_id, status=status)
    ref = RunRef(
        tracking_uri=store.tracking_uri,
        experiment_id=store.experiment_id,
        run_id=run.info.run_id,
        system_metrics=config.tracking.system_metrics,
        log_model=config.tracking.log_model,
        job=job,
        folder=f"{storage_root(config.run.storage)}/{name}",
        journal=f"{cache_folder(config.data.cache)}/journals/{run.info.run_id}.jsonl",
        drain_timeout=config.tracking.drain_timeout,
    )
    client.set_tag(ref.run_id, JOB_TAG, job)
    log_params(client, ref.run_id, dict(configs.flat(config)))
    for key, value in {**environment.run_tags(), **(tags or {})}.items():
        client.set_tag(ref.run_id, key, value)
    return ref


def create_run(store: TrackingStore, name: str, tags: Mapping[str, str]) -> RunRef:
    """Create a run that is no training: it has neither system metrics nor a model."""
    made = mlflow_client(store.tracking_uri).create_run(store.experiment_id, run_name=name, tags=dict(tags))
    return RunRef(store.tracking_uri, store.experiment_id, made.info.run_id)


def link_model(ref: RunRef, model_id: str) -> None:
    """Show the run on the page of a logged model, and the model on the run's; empty: no model."""
    if not model_id:
        return
    from mlflow.entities import LoggedModelInput

    with _warning_of_errors("the model was not linked with its evaluation in MLflow"):
        mlflow_client(ref.tracking_uri).log_inputs(ref.run_id, models=[LoggedModelInput(model_id)])


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, object]) -> None:
    """Log parameters.

    If a resumed run has another value of one, the new value becomes the tag `changed.NAME`.
    """
    from mlflow.entities import Param, RunTag

    present = client.get_run(run_id).data.params
    texts = {key: redact(str(value)) for key, value in values.items()}
    new = [Param(key, text) for key, text in texts.items() if key not in present]
    changed = [RunTag(f"changed.{k}", text) for k, text in texts.items() if present.get(k, text) != text]
    for start in range(0, len(new), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=new[start : start + _PARAMS_PER_CALL])
    if changed:
        client.log_batch(run_id, tags=changed)


@contextmanager
def end_run_on_exit(ref: RunRef | None) -> Iterator[None]:
    """End the run when the context ends: as finished, failed or killed.

    A watchdog process waits for this process to end, and ends the run if this process was killed.
    """
    if ref is None:
        yield
        return
    watchdog = subprocess.Popen(
        [sys.executable, "-m", "cvdist.tracking.watchdog", ref.tracking_uri, ref.run_id, ref.job],
        stdin=subprocess.PIPE,
        start_new_session=True,  # survives Ctrl-C and the end of the process group
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    status = "FINISHED"
    try:
        yield
    except Exception:
        status = "FAILED"
        raise
    except BaseException:
        status = "KILLED"
        raise
    finally:
        end_run(ref.tracking_uri, ref.run_id, status, ref.job)
        try:
            watchdog.communicate(b"ended\n", timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            watchdog.kill()


def wait_for_server(ref: RunRef) -> bool:
    """Wait until the store answers, at most `--tracking-drain-timeout` seconds, before a job's last words.

    Returns:
        Whether the store answers.
    """
    deadline, warned = time.monotonic() + ref.drain_timeout, False
    while True:
        try:
            with short_retries(_UPLOAD_SECONDS):
                mlflow_client(ref.tracking_uri).get_run(ref.run_id)
            return True
        except Exception as error:
            left = deadline - time.monotonic()
            if left <= 0 or not ref.tracking_uri.startswith("http"):
                return False  # the calls that follow report the error
            if not warned:
                reason = first_line(error)
                logger.warning(
                    "MLflow is away: waiting %.0f s for it (--tracking-drain-timeout): %s", left, reason
                )
                warned = True
            time.sleep(min(RETRY_SECONDS, left))


@contextmanager
def _warning_of_errors(failed: str) -> Iterator[None]:
    """Log an error of MLflow, of any type, rather than raise it: the result of the job is stored already."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s", failed, first_line(error))


def end_run(tracking_uri: str, run_id: str, status: str, job: str) -> None:
    """Set the final status of a run, unless another job than `job` owns it now. Errors are logged."""
    with _warning_of_errors(f"the MLflow run {run_id} could not be ended as {status}"):
        client = mlflow_client(tracking_uri)
        if client.get_run(run_id).data.tags.get(JOB_TAG, job) == job:
            client.set_terminated(run_id, status)


def set_status(ref: RunRef, status: str, tags: Mapping[str, str] | None = None) -> None:
    """Set the status and tags of a run. Errors are logged."""
    with _warning_of_errors(f"the MLflow run {ref.run_id} could not be set to {status}"):
        client = mlflow_client(ref.tracking_uri)
        for key, value in (tags or {}).items():
            client.set_tag(ref.run_id, key, value)
        client.update_run(ref.run_id, status=status)


def end_children(tracking_uri: str, run_id: str, status: str, job: str) -> None:
    """Set the final status of the child runs that belong to `job` and have not ended. Errors are logged."""
    with _warning_of_errors(f"the runs below the MLflow run {run_id} could not be ended"):
        client = mlflow_client(tracking_uri)
        experiment = client.get_run(run_id).info.experiment_id
        below = f"tags.`{PARENT_TAG}` = '{run_id}' and tags.`{JOB_TAG}` = '{job}'"
        for child in client.search_runs([experiment], below, max_results=1000):
            if child.info.status in ("RUNNING", "SCHEDULED"):
                client.set_terminated(child.info.run_id, status)


def set_description(ref: RunRef, markdown: str, seconds_to_first_step: float = 0.0) -> None:
    """Set the description of a run and, if it is not 0, its time to the first step. Errors are logged.

    Args:
        ref: The run.
        markdown: The description, which the MLflow UI shows at the top of the run's page.
        seconds_to_first_step: Seconds from the start of the job to the end of its first step.
    """
    with _warning_of_errors("the run's description was not delivered to MLflow"):
        client = mlflow_client(ref.tracking_uri)
        client.set_tag(ref.run_id, "mlflow.note.content", markdown)
        if seconds_to_first_step:
            client.log_metric(ref.run_id, FIRST_STEP, seconds_to_first_step)


def log_file(ref: RunRef, name: str, content: bytes) -> None:
    """Upload a file to the artifacts of a run. An existing file of this name is replaced.

    Raises:
        UserError: If the store refuses it.
    """
    try:
        with short_retries(_UPLOAD_SECONDS):
            upload_file(mlflow_client(ref.tracking_uri), ref.run_id, name, content)
    except Exception as error:  # MLflow passes on errors of servers, buckets and permissions of any type
        raise UserError(
            f"the run {ref.run_id} in {redact(ref.tracking_uri)} does not take {name} ({first_line(error)}): "
            "repair its artifact store"
        ) from error


def upload_file(client: MlflowClient, run_id: str, name: str, content: bytes) -> None:
    """Upload a file to the artifacts of a run, and raise the errors of MLflow as they are."""
    where = PurePosixPath(name)
    with tempfile.TemporaryDirectory(prefix="cvdist-file-") as folder:
        path = Path(folder) / where.name
        path.write_bytes(content)
        parent = str(where.parent)
        client.log_artifact(run_id, str(path), None if parent == "." else parent)


def tracking_uri_of(tracking_uri: str, storage: str) -> str:
    """Return the address of the tracking store: the configured one, else a database in the storage folder.

    The arguments are the values of `TrackingConfig.uri` and `RunConfig.storage`.

    Raises:
        UserError: If no store is configured and the storage is not a local folder.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return uri.rstrip("/")
    root = storage_root(storage)
    if "://" in root:
        raise UserError(
            f"--storage {root} is a URI: name an MLflow server with --tracking-uri or MLFLOW_TRACKING_URI, or "
            "do without: --tracking none"
        )
    return _sqlite_uri(f"{root}/mlflow.db")


def _sqlite_uri(path: str) -> str:
    """Return the address of the SQLite database at an absolute path."""
    if "%" in path or "?" in path:
        # With its slashes, because MLflow makes the folder that the address names without decoding it.
        path = "/" + path[1:].replace("%", "%25").replace("?", "%3F").replace("/", "%2F")
    return f"{_SQLITE}{path}"


def sqlite_path(uri: str) -> Path | None:
    """Return the path of the database behind the address of an SQLite store; None for any other store."""
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0])) if uri.startswith(_SQLITE) else None


def _create_sqlite_folder(database: Path) -> str:
    """Create the folder of an SQLite store.

    Returns the URI of the folder for the artifacts of its experiments.
    """
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--tracking-uri: {database.parent} can't be created: {error.strerror}") from error
    return (database.parent.resolve() / "mlartifacts").as_uri()


def require_server(uri: str, timeout: float, otherwise: str = OR_NONE) -> None:
    """Check that a server answers. The client of MLflow would retry for minutes.

    Args:
        uri: Address of the server.
        timeout: Seconds to wait for an answer.
        otherwise: Text at the end of the error message that names an alternative.

    Raises:
        UserError: If the server does not answer.
    """
    try:
        parts = urlsplit(uri.rstrip("/"))
        # Unlike MLflow's client, urllib would take user name and password for a part of the host.
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        with urllib.request.urlopen(f"{address}/health", timeout=timeout):
            return
    except urllib.error.HTTPError:
        return  # the server answers; if it refuses, the first real call reports that better
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # the server answers; MLflow has its own settings for certificates
        raise UserError(
            f"no MLflow server answers at {redact(uri)} within {timeout:g} s (--tracking-timeout): {reason}. "
            f"Start it, or correct --tracking-uri or MLFLOW_TRACKING_URI{otherwise}"
        ) from error


def short_retries(timeout: float) -> AbstractContextManager[None]:
    """Limit MLflow's client to one retry and `timeout` seconds per request for the duration of the context."""
    return environment.variables(
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT=str(max(1, int(timeout)))
    )


def _experiment(client: MlflowClient, uri: str, name: str, artifacts: str | None) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(
                name,
                artifact_location=artifacts and f"{artifacts}/{quote(name, safe='')}",
                # The UI shows charts, not chats, and the runs as somebody who shares a view of them would.
                tags={
                    "mlflow.experimentKind": "custom_model_development",
                    f"mlflow.sharedViewState.{_VIEW}": json.dumps(_RUNS_VIEW),
                },
            )
        except MlflowException:
            # Another job that starts at the same time has created it.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        at = "" if "***@" in redact(uri) else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
        raise UserError(
            f"the experiment {name!r} is deleted: restore it with {at}mlflow experiments restore "
            f"--experiment-id {found.experiment_id}, or name another with --experiment"
        )
    return str(found.experiment_id)


def _find(client: MlflowClient, experiment_id: str, name: str) -> Any:
    found = client.search_runs([experiment_id], f"tags.`{NAME_TAG}` = '{name}'", max_results=1)
    return found[0] if found else None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without credentials."""
    text = str(error).strip() or type(error).__name__
    return redact(text.splitlines()[0][:300])
