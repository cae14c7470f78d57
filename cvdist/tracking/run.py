"""Opening and ending the MLflow run of a job. The process that starts a job owns its run."""

from __future__ import annotations

import dataclasses
import logging
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from cvdist import config as configs
from cvdist.config import TrackingConfig, TrainConfig, cache_folder, storage_root
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

FIRST_STEP = "speed/seconds_to_first_step"
NAME_TAG, JOB_TAG = "cvdist.name", "cvdist.job"
PARENT_TAG = "mlflow.parentRunId"
_UPLOAD_SECONDS = 60.0
_AWAY_SECONDS = 1.0  # between two looks for a server that is away
_PARAMS_A_CALL = 100  # MLflow's own limit


@dataclass(frozen=True)
class RunRef:
    """Enough for any process to find the run."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    system_metrics: bool
    log_model: bool
    job: str = ""
    """The job that owns the run (`cvdist.checkpoints.fence`)."""
    folder: str = ""
    """Folder or URI of the run's checkpoints."""
    journal: str = ""
    """On a node: file for metrics that could not be delivered."""
    patience: float = TrackingConfig.tracking_patience
    """Seconds that a finished job waits for a server that is away."""

    def to_dict(self) -> dict[str, Any]:
        """For another process: `RunRef(**values)`."""
        return dataclasses.asdict(self)

    @property
    def page(self) -> str:
        """The run's address in the MLflow UI, from `#` on where no server is known."""
        path = f"#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{redact(self.tracking_uri)}/{path}" if self.tracking_uri.startswith("http") else path

    def require_reachable_from(self, nodes: int) -> None:
        """Refuse a store in a file for a cluster of several machines.

        Raises:
            UserError: naming the setting.
        """
        if nodes > 1 and not self.tracking_uri.startswith("http"):
            raise UserError(
                f"the MLflow store {redact(self.tracking_uri)} is a file of this machine and the cluster has "
                f"{nodes} nodes: name a server with --tracking-uri or MLFLOW_TRACKING_URI"
            )


@dataclass(frozen=True)
class Store:
    """A tracking store that has answered, and the experiment in it."""

    tracking_uri: str
    experiment_id: str


def mlflow_client(tracking_uri: str) -> MlflowClient:
    """An MLflow client; MLflow is imported on the first call."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # no git in a container is no reason to warn
    # What is not delivered is tried again here, in order: MLflow's own retries would take minutes a call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the job's report names the page
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # after the import, which sets up MLflow's own logging
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri)


@contextmanager
def default_store(tracking_uri: str) -> Iterator[None]:
    """For those of MLflow's functions that take no address: they use this store while the context lasts."""
    import mlflow

    variable = os.environ.get("MLFLOW_TRACKING_URI")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which set_tracking_uri has set


def open_store(config: TrainConfig) -> Store | None:
    """Reach the tracking store and find or make the experiment. None with `--tracking none`.

    Raises:
        UserError: if the store can't be reached or written; at the latest after `--tracking-timeout`. With
            `--tracking optional` that is a warning, and None is returned.
    """
    if config.tracking.tracking == "none":
        return None
    try:
        return _open_store(config)
    except UserError as error:
        if config.tracking.tracking != "optional":
            raise
        logger.warning("training goes on without MLflow (--tracking optional): %s", error)
        return None


def _open_store(config: TrainConfig) -> Store:
    tracking = config.tracking
    if not environment.is_installed("mlflow"):
        raise UserError("MLflow is not installed: pip install mlflow, or do without: --tracking none")
    uri = tracking_uri_of(config)
    artifacts = None
    if uri.startswith("http"):
        require_server(uri, tracking.tracking_timeout)
    elif uri.startswith("sqlite:///"):
        artifacts = _make_room(Path(uri.removeprefix("sqlite:///")))
    try:
        with short_retries(tracking.tracking_timeout):
            client = mlflow_client(uri)
            return Store(uri, _experiment(client, tracking.experiment, artifacts))
    except Exception as error:  # a database, a proxy, a permission: MLflow passes on whatever it meets
        raise UserError(
            f"the MLflow store {redact(uri)} refused: {first_line(error)}. Mend it, name another one with "
            "--tracking-uri, or do without: --tracking none"
        ) from error


def start_run(
    config: TrainConfig,
    store: Store,
    *,
    continued: bool,
    job: str = "",
    tags: Mapping[str, str] | None = None,
    status: str = "RUNNING",
) -> RunRef:
    """The run of this job: a new one, or, where a job of this name is `continued`, the one it had.

    `job` owns it from now on, and nobody else ends it. Logs the whole configuration, and where and from what
    the job was started. tags: more of them.
    """
    client = mlflow_client(store.tracking_uri)
    name = config.checkpoint.name
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
        folder=f"{storage_root(config)}/{name}",
        journal=f"{cache_folder(config)}/journals/{run.info.run_id}.jsonl",
        drain_timeout=config.tracking.tracking_patience,
    )
    client.set_tag(ref.run_id, JOB_TAG, job)
    log_params(client, ref.run_id, dict(configs.flat(config)))
    for key, value in {**environment.run_tags(), **(tags or {})}.items():
        client.set_tag(ref.run_id, key, value)
    return ref


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, object]) -> None:
    """Log parameters; one that a continued run has with another value becomes the tag `changed.NAME`."""
    from mlflow.entities import Param, RunTag

    present = client.get_run(run_id).data.params
    texts = {key: redact(str(value)) for key, value in values.items()}
    new = [Param(key, text) for key, text in texts.items() if key not in present]
    changed = [RunTag(f"changed.{k}", text) for k, text in texts.items() if present.get(k, text) != text]
    for start in range(0, len(new), _PARAMS_A_CALL):
        client.log_batch(run_id, params=new[start : start + _PARAMS_A_CALL])
    if changed:
        client.log_batch(run_id, tags=changed)


@contextmanager
def ended(ref: RunRef | None) -> Iterator[None]:
    """Whatever becomes of the block, the run gets its end: finished, failed or killed.

    A small process waits for this one to end, and ends the run if this one no longer could.
    """
    if ref is None:
        yield
        return
    watchdog = subprocess.Popen(
        [sys.executable, "-m", "cvdist.tracking.watchdog", ref.tracking_uri, ref.run_id, ref.job],
        stdin=subprocess.PIPE,
        start_new_session=True,  # outlives a Ctrl-C and a killed process group
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
    """Before a finished job's last words: until the store answers, at most `--tracking-patience` seconds."""
    deadline, said = time.monotonic() + ref.drain_timeout, False
    while True:
        try:
            with short_retries(_UPLOAD_SECONDS):
                mlflow_client(ref.tracking_uri).get_run(ref.run_id)
            return True
        except Exception as error:
            left = deadline - time.monotonic()
            if left <= 0 or not ref.tracking_uri.startswith("http"):
                return False  # what is to be written says so by itself
            if not said:
                reason = first_line(error)
                logger.warning("MLflow is away: waiting %.0f s for it (--tracking-patience): %s", left, reason)
                said = True
            time.sleep(min(_AWAY_SECONDS, left))


def end_run(tracking_uri: str, run_id: str, status: str, job: str) -> None:
    """Give the run its final status, unless another job than `job` owns it by now.

    A store that is away is logged, not raised: the job's result stands.
    """
    try:
        client = mlflow_client(tracking_uri)
        if client.get_run(run_id).data.tags.get(JOB_TAG, job) == job:
            client.set_terminated(run_id, status)
    except Exception as error:  # see above
        logger.warning("the MLflow run %s could not be ended as %s: %s", run_id, status, first_line(error))


def set_status(ref: RunRef, status: str, tags: Mapping[str, str] | None = None) -> None:
    """Change what the UI shows of a run; a store that is away is logged, not raised."""
    try:
        client = mlflow_client(ref.tracking_uri)
        for key, value in (tags or {}).items():
            client.set_tag(ref.run_id, key, value)
        client.update_run(ref.run_id, status=status)
    except Exception as error:  # see `end_run`
        logger.warning("the MLflow run %s is not shown as %s: %s", ref.run_id, status, first_line(error))


def end_children(tracking_uri: str, run_id: str, status: str, job: str) -> None:
    """Give the runs of `job` below a run their final status, where they have none."""
    try:
        client = mlflow_client(tracking_uri)
        experiment = client.get_run(run_id).info.experiment_id
        below = f"tags.`{PARENT_TAG}` = '{run_id}' and tags.`{JOB_TAG}` = '{job}'"
        for child in client.search_runs([experiment], below, max_results=1000):
            if child.info.status in ("RUNNING", "SCHEDULED"):
                client.set_terminated(child.info.run_id, status)
    except Exception as error:  # see `end_run`
        logger.warning("the runs below the MLflow run %s could not be ended: %s", run_id, first_line(error))


def describe(ref: RunRef, markdown: str, seconds_to_first_step: float = 0.0) -> None:
    """Put `markdown` on top of the run's page, and note the time to the first step, if there was one."""
    try:
        client = mlflow_client(ref.tracking_uri)
        client.set_tag(ref.run_id, "mlflow.note.content", markdown)
        if seconds_to_first_step:
            client.log_metric(ref.run_id, FIRST_STEP, seconds_to_first_step)
    except Exception as error:  # the job's result stands
        logger.warning("the run's description was not delivered to MLflow: %s", first_line(error))


def log_file(ref: RunRef, name: str, content: bytes) -> None:
    """Put a file among a run's artifacts; one of this name is replaced.

    Raises:
        UserError: if the store does not take it.
    """
    try:
        with short_retries(_UPLOAD_SECONDS):
            upload_file(mlflow_client(ref.tracking_uri), ref.run_id, name, content)
    except Exception as error:  # a server, a bucket, a permission: MLflow passes on whatever it meets
        raise UserError(
            f"the run {ref.run_id} in {redact(ref.tracking_uri)} does not take {name} ({first_line(error)}): "
            "mend its artifact store"
        ) from error


def upload_file(client: MlflowClient, run_id: str, name: str, content: bytes) -> None:
    """The same with MLflow's own errors."""
    where = PurePosixPath(name)
    with tempfile.TemporaryDirectory(prefix="cvdist-file-") as folder:
        path = Path(folder) / where.name
        path.write_bytes(content)
        parent = str(where.parent)
        client.log_artifact(run_id, str(path), None if parent == "." else parent)


def tracking_uri_of(config: TrainConfig) -> str:
    """Of the tracking store.

    Raises:
        UserError: if none is named, and the storage is no folder that could hold one.
    """
    uri = config.tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return uri.rstrip("/")
    root = storage_root(config)
    if "://" in root:
        raise UserError(
            f"--storage {root} is a URI: name an MLflow server with --tracking-uri or MLFLOW_TRACKING_URI, or "
            "do without: --tracking none"
        )
    return f"sqlite:///{root}/mlflow.db"


def _make_room(database: Path) -> str:
    """Create the folder of an sqlite store; returns where its experiments keep their artifacts."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--tracking-uri: {database.parent} can't be created: {error.strerror}") from error
    return (database.parent.resolve() / "mlartifacts").as_uri()


def require_server(uri: str, timeout: float, otherwise: str = ", or do without: --tracking none") -> None:
    """Ask a server whether it is there: MLflow's own client would retry for minutes.

    Raises:
        UserError: if it does not answer, ending with the alternative.
    """
    try:
        parts = urlsplit(uri.rstrip("/"))
        # MLflow's client takes name and password from the URI; here they would become a part of the host.
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        with urllib.request.urlopen(f"{address}/health", timeout=timeout):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it refuses, the first real call says better
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # likewise: MLflow has settings of its own for certificates
        raise UserError(
            f"no MLflow server answers at {redact(uri)} within {timeout:g} s (--tracking-timeout): {reason}. "
            f"Start it, or correct --tracking-uri or MLFLOW_TRACKING_URI{otherwise}"
        ) from error


@contextmanager
def short_retries(timeout: float) -> Iterator[None]:
    """MLflow's client gives up on a server after `timeout` seconds and one more try."""
    limits = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, int(timeout))),
    }
    before = {key: os.environ.get(key) for key in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(
                name,
                artifact_location=artifacts and f"{artifacts}/{name}",
                tags={"mlflow.experimentKind": "custom_model_development"},  # the UI shows charts, not chats
            )
        except MlflowException:
            # Another job that starts at the same moment was first.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name!r} is deleted: restore it, or name another with --experiment")
    return str(found.experiment_id)


def _find(client: MlflowClient, experiment_id: str, name: str) -> Any:
    found = client.search_runs([experiment_id], f"tags.`{NAME_TAG}` = '{name}'", max_results=1)
    return found[0] if found else None


def first_line(error: Exception) -> str:
    """What an error says first, without credentials."""
    text = str(error).strip() or type(error).__name__
    return redact(text.splitlines()[0][:300])
