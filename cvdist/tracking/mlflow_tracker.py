"""Deliver a run's results to MLflow from a queue, in a background thread."""

from __future__ import annotations

import io
import json
import logging
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cvdist.errors import Superseded, UserError
from cvdist.log import duration, redact
from cvdist.storage import Folder
from cvdist.tracking.journal import Journal, MetricDelivery, StepMetrics
from cvdist.tracking.run import RunRef, first_line, log_params, mlflow_client, upload_file
from cvdist.tracking.tracker import Attempt, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

    from cvdist.checkpoints.format import Normalization
    from cvdist.data.dataset import DatasetInfo
    from cvdist.results import ModelIdentity

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
_WARN_SECONDS = 30.0  # between two warnings while the server is unreachable
_CLOSE_SECONDS = 120.0
# Codes of MLflow's errors for which a retry may succeed.
_TRANSIENT = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
_LASTING = "unable to open database file|readonly database|not a database"  # of SQLite

_STARTED_AT, _STARTED = time.time(), time.monotonic()

Action = Callable[["MlflowClient"], None]
"""Something to deliver that is not a metric."""


class MlflowTracker(Tracker):
    """Logs the results of one run to MLflow. Calls return at once, and a thread talks to the server.

    While the server is unreachable, metrics are kept in a journal and everything else in memory. When it is
    back, both are delivered: metrics in order and exactly once. If the server is still unreachable when the job
    ends, the journal stays for `jobs/replay.py`.
    """

    def __init__(self, ref: RunRef, node: str, attempt: Attempt | None = None) -> None:
        """Start the thread.

        Args:
            ref: The run.
            node: Name of this machine in the names of its system metrics.
            attempt: The current attempt of the run.
        """
        self._ref, self._node = ref, node
        self._ensure_current = attempt.ensure_current if attempt else None
        self._number = attempt.number if attempt else 0
        self._queue: queue.Queue[Any] = queue.Queue()
        journal = Path(ref.journal) if ref.journal else None
        self._journal = Journal(journal, ref.tracking_uri, ref.run_id)
        self._delivery = MetricDelivery(ref.run_id)
        self._metrics: list[StepMetrics] = []
        self._actions: list[Action] = []
        self._lost = self._num_delivered = 0
        self._finished = self._superseded = False
        self._away_since = self._warned_at = 0.0
        # Importing MLflow takes seconds, so it is imported after the first step, for which people wait.
        self._first_metrics = threading.Event()
        if attempt is not None:
            self._queue.put(lambda client: client.set_tag(ref.run_id, "cvdist.attempt", str(attempt.number)))
            self._queue.put(_measured_now({"run/attempt": attempt.number}, attempt.number))
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log_params(self, values: Mapping[str, object]) -> None:
        copied = dict(values)
        self._queue.put(lambda client: log_params(client, self._ref.run_id, copied))

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self._queue.put(_measured_now(values, step))
        self._first_metrics.set()

    def log_dataset(self, info: DatasetInfo, digest: Callable[[], str]) -> None:
        self._queue.put(lambda client: log_dataset_input(client, self._ref.run_id, info, digest()))

    def log_figure(self, name: str, draw: Callable[[], Figure]) -> None:
        def make() -> bytes:
            from cvdist.figures.style import save_png

            file = io.BytesIO()
            save_png(draw(), file)
            return file.getvalue()

        self.log_artifact(f"figures/{name}.png", make)

    def log_artifact(self, name: str, make: Callable[[], bytes]) -> None:
        self._queue.put(lambda client: upload_file(client, self._ref.run_id, name, make()))

    def log_model(
        self,
        model: nn.Module,
        identity: ModelIdentity,
        normalization: Normalization,
        precision: str,
        example: Tensor,
        step: int,
        thresholds: Sequence[float] = (),
    ) -> None:
        """Log the model if the run wants it, and wait until it is delivered or the drain timeout is over."""
        self._finished = True  # the model is logged when training is finished
        logger.info("results    go to MLflow: figures%s", " and the best model" if self._ref.log_model else "")
        if not self._ref.log_model:
            return
        from cvdist.tracking.model import log_model

        deadline = time.monotonic() + self._ref.drain_timeout
        while True:
            try:
                self._require_current()
                log_model(self._ref, model, identity, normalization, precision, example, step, thresholds)
                return
            except Exception as error:  # training is done, and an error here must not discard its result
                logger.debug("", exc_info=True)
                if not _is_transient(error) or time.monotonic() > deadline:
                    logger.warning(
                        "the model was not logged to MLflow (%s): when it is back, start the same job with its "
                        "--name again, which has nothing left to train and logs the model",
                        first_line(error),
                    )
                    return
            time.sleep(FLUSH_SECONDS)

    def close(self) -> None:
        """Deliver everything that is pending. Gives up if nothing was delivered for the drain timeout."""
        self._queue.put(None)
        self._first_metrics.set()
        seen, since = self._num_delivered, time.monotonic()
        most = max(self._ref.drain_timeout, _CLOSE_SECONDS) + FLUSH_SECONDS
        while self._thread.is_alive() and time.monotonic() - since < most:
            self._thread.join(0.5)
            if self._num_delivered != seen:  # drawing a figure takes seconds on a busy machine
                seen, since = self._num_delivered, time.monotonic()
        if self._thread.is_alive():
            logger.warning(
                "MLflow accepted nothing for %g s (--tracking-drain-timeout): "
                "the last results are not delivered",
                most,
            )
        if self._metrics and not self._superseded:
            self._report_journal()
        if self._lost + len(self._actions) and not self._superseded:
            logger.warning("%d results could not be delivered to MLflow", self._lost + len(self._actions))

    def _deliver(self) -> None:
        self._first_metrics.wait()
        client = mlflow_client(self._ref.tracking_uri)
        monitor = start_system_metrics(self._ref, self._node) if self._ref.system_metrics else None
        self._metrics = self._journal.undelivered()
        closed_at = 0.0
        while not closed_at or (self._away_since and time.monotonic() < closed_at + self._ref.drain_timeout):
            if self._collect():
                closed_at = time.monotonic()
            self._send(client)
        if monitor is not None:
            monitor.finish()

    def _collect(self) -> bool:
        """Collect what arrives within two seconds, so that MLflow gets few calls with many metrics each.

        Returns:
            Whether the tracker was closed.
        """
        deadline = time.monotonic() + FLUSH_SECONDS
        new: list[StepMetrics] = []
        closed = False
        while not closed and (left := deadline - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if item is None:
                closed = True
            elif isinstance(item, StepMetrics):
                new.append(item)
            else:
                self._actions.append(item)
        self._metrics += new
        if self._away_since:
            self._journal.append(new)
        return closed

    def _send(self, client: MlflowClient) -> None:
        """Deliver all pending metrics and actions. If the server is unreachable, they stay pending."""
        if self._superseded:
            self._metrics, self._actions = [], []
            return
        try:
            self._require_current()
            self._delivery.deliver(client, self._metrics)
        except Superseded as error:
            self._superseded = True
            logger.warning("nothing more goes to MLflow: %s", error)
            return
        except Exception as error:  # unreachable or failing: training goes on
            self._defer(error)
            return
        self._metrics = []
        self._num_delivered += 1
        if self._away_since:
            logger.info(
                "MLflow is back after %s and has all metrics", duration(time.monotonic() - self._away_since)
            )
            self._away_since = 0.0
        self._journal.clear()
        while self._actions:
            try:
                self._actions[0](client)
            except Exception as error:  # a figure that is lost must not stop training
                # A `UserError` here was raised while drawing, and a retry would raise it again.
                if _is_transient(error) and not isinstance(error, UserError):
                    self._defer(error)
                    return
                self._lost += 1
                logger.warning("not delivered to MLflow: %s", first_line(error))
                logger.debug("", exc_info=True)
            self._actions.pop(0)
            self._num_delivered += 1

    def _defer(self, error: Exception) -> None:
        """Keep what is pending, and log a warning, at most every `_WARN_SECONDS`."""
        now = time.monotonic()
        if not self._away_since:
            self._away_since = now
            if self._journal.path is not None and not self._journal.path.exists():
                self._journal.append(self._metrics)
        if now - self._warned_at > _WARN_SECONDS:
            self._warned_at = now
            logger.warning("MLflow is away (%s): results are kept and delivered later", first_line(error))

    def _require_current(self) -> None:
        if self._ensure_current is not None:
            self._ensure_current()

    def _report_journal(self) -> None:
        """Move the journal to the storage if possible, and log where it is."""
        if self._journal.path is None:
            self._lost += len(self._metrics)
            return
        self._journal.append([], finished=self._finished)
        where = f"{socket.gethostname()}:{self._journal.path}"
        command = str(self._journal.path)
        try:
            name = f"undelivered-{self._number}.jsonl"
            Folder.open(self._ref.folder, "--storage").write(name, self._journal.path.read_bytes())
            where = command = f"{redact(self._ref.folder)}/{name}"
            self._journal.clear()
        except (UserError, OSError) as error:
            logger.debug("%s", error)
        logger.warning(
            "MLflow was away until the end: %d metrics are in %s. When it is back: python jobs/replay.py %s",
            sum(len(item.values) for item in self._metrics),
            where,
            command,
        )


def _measured_now(values: Mapping[str, float], step: int) -> StepMetrics:
    # Monotonic, even if the clock is set back, since MLflow sorts metrics by their times.
    moment = _STARTED_AT + time.monotonic() - _STARTED
    return StepMetrics({name: float(value) for name, value in values.items()}, step, int(moment * 1000))


def _is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed."""
    from mlflow.exceptions import MlflowException
    from requests import ConnectionError, Timeout

    if isinstance(error, Superseded):
        return False
    if isinstance(error, MlflowException):
        return error.error_code in _TRANSIENT and not re.search(_LASTING, str(error))
    return isinstance(error, ConnectionError | Timeout | UserError)


class SystemMetricsTracker(Tracker):
    """Logs only the system metrics of a node, for the first worker of every node except that of rank 0."""

    def __init__(self, ref: RunRef, node: str) -> None:
        """Start measuring in a thread, as importing MLflow takes seconds."""
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._start, args=(ref, node), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop measuring."""
        self._thread.join(_CLOSE_SECONDS)
        if self._monitor is not None:
            self._monitor.finish()

    def _start(self, ref: RunRef, node: str) -> None:
        mlflow_client(ref.tracking_uri)
        self._monitor = start_system_metrics(ref, node)


def start_system_metrics(ref: RunRef, node: str) -> Any:
    """Start MLflow's monitor, whose metrics are named `system/NODE/...`. Returns None if it can't run here."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    try:
        monitor = SystemMetricsMonitor(
            ref.run_id, resume_logging=True, node_id=node, tracking_uri=ref.tracking_uri
        )
        monitor.start()
    except Exception as error:  # training goes on without system metrics
        logger.warning("no system metrics of %s: %s", node, error)
        return None
    return monitor


def log_dataset_input(client: MlflowClient, run_id: str, info: DatasetInfo, digest: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    schema = {
        "mlflow_tensorspec": {
            "features": f"uint8 {info.channels}x{info.height}x{info.width}",
            "targets": f"int64, {len(info.classes)} classes",
        }
    }
    profile = {"train": info.train_size, "valid": info.valid_size, "classes": list(info.classes)}
    dataset = Dataset(
        name=info.name,
        digest=digest[:36],  # the length limit of MLflow's column
        source_type=info.source.partition("://")[0] if "://" in info.source else "local",
        source=json.dumps({"uri": info.source}),
        schema=json.dumps(schema),
        profile=json.dumps(profile),
    )
    context = InputTag("mlflow.data.context", "training and validation")
    client.log_inputs(run_id, [DatasetInput(dataset, [context])])
    client.log_batch(run_id, params=[Param("data.sha256", digest)])
