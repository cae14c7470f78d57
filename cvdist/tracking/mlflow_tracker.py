"""A run's results on their way to MLflow: a queue, and a thread that empties it."""

from __future__ import annotations

import functools
import io
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cvdist.tracking.run import RunRef, client_of, first_line, log_params, put_file
from cvdist.tracking.tracker import NoTracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

    from cvdist.data.dataset import DatasetInfo
    from cvdist.training.checkpoint import ModelIdentity

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 2.0
_METRICS_A_CALL = 1000  # MLflow's own limit
_CLOSE_SECONDS = 120.0

# The metrics of an epoch and those of a step come together: one name of each tells which are there.
_MARKERS = ("valid/loss", "step/loss")

Action = Callable[["MlflowClient"], None]
Measured = tuple[dict[str, float], int, int]  # values, step, milliseconds since 1970


class MlflowTracker:
    """Fills one run (`cvdist.tracking.tracker.Tracker`). Calls return at once; a thread talks to MLflow."""

    def __init__(self, ref: RunRef, node: str) -> None:
        """`node` names this machine's system metrics."""
        self._ref = ref
        self._node = node
        self._queue: queue.Queue[Any] = queue.Queue()
        self._lost = self._taken = 0
        self._delivered: dict[str, set[int]] = {}
        # MLflow takes seconds to import: not before the first step, which people wait for.
        self._first_metrics = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def params(self, values: Mapping[str, object]) -> None:
        """See `Tracker`."""
        copied = dict(values)
        self._queue.put(lambda client: log_params(client, self._ref.run_id, copied))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._queue.put((dict(values), step, int(time.time() * 1000)))
        self._first_metrics.set()

    def dataset(self, info: DatasetInfo, digest: Callable[[], str]) -> None:
        """See `Tracker`."""
        self._queue.put(lambda client: _log_dataset(client, self._ref.run_id, info, digest()))

    def figure(self, name: str, draw: Callable[[], Figure]) -> None:
        """See `Tracker`."""
        self._queue.put(lambda client: _log_figure(client, self._ref.run_id, name, draw()))

    def file(self, name: str, make: Callable[[], bytes]) -> None:
        """See `Tracker`."""
        self._queue.put(lambda client: put_file(client, self._ref.run_id, name, make()))

    def text(self, name: str, content: str) -> None:
        """See `Tracker`."""
        self._queue.put(lambda client: client.log_text(self._ref.run_id, content, name))

    def model(
        self, model: nn.Module, identity: ModelIdentity, info: DatasetInfo, example: Tensor, step: int
    ) -> None:
        """See `Tracker`."""
        if not self._ref.log_model:
            return
        from cvdist.tracking.model import log_model

        log_model(self._ref, model, identity, info, example, step)

    def close(self) -> None:
        """See `Tracker`. Waits until all is delivered, or nothing has been for two minutes."""
        self._queue.put(None)
        self._first_metrics.set()
        seen, since = self._taken, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < _CLOSE_SECONDS:
            self._thread.join(0.5)
            if self._taken != seen:  # drawing takes seconds a figure on a busy machine
                seen, since = self._taken, time.monotonic()
        if self._thread.is_alive():
            logger.warning("MLflow took nothing for %g s: the last results are lost", _CLOSE_SECONDS)
        if self._lost:
            logger.warning("%d results could not be delivered to MLflow", self._lost)

    def _deliver(self) -> None:
        self._first_metrics.wait()
        client = client_of(self._ref.tracking_uri)
        monitor = start_system_metrics(self._ref, self._node) if self._ref.system_metrics else None
        self._attempt(self._look_up_delivered, client)
        closed = False
        while not closed:
            metrics, actions, closed = self._collect()
            if metrics:
                self._attempt(functools.partial(_log_metrics, self._ref.run_id, metrics), client)
            for action in actions:
                self._attempt(action, client)
        if monitor is not None:
            monitor.finish()

    def _collect(self) -> tuple[list[Measured], list[Action], bool]:
        """What arrives within two seconds, and whether the end has come: few calls, each with much in it."""
        metrics: list[Measured] = []
        actions: list[Action] = []
        deadline = time.monotonic() + _FLUSH_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if item is None:
                return metrics, actions, True
            if not isinstance(item, tuple):
                actions.append(item)
            elif self._is_new(*item[:2]):
                metrics.append(item)
        return metrics, actions, False

    def _look_up_delivered(self, client: MlflowClient) -> None:
        for marker in _MARKERS:
            history = client.get_metric_history(self._ref.run_id, marker)
            self._delivered[marker] = {metric.step for metric in history}

    def _is_new(self, values: Mapping[str, float], step: int) -> bool:
        """Whether no earlier attempt has delivered this step: a resumed run repeats some."""
        for marker in _MARKERS:
            if marker in values:
                steps = self._delivered.setdefault(marker, set())
                if step in steps:
                    return False
                steps.add(step)
        return True

    def _attempt(self, action: Action, client: MlflowClient) -> None:
        try:
            action(client)
            self._taken += 1
        except Exception as error:  # a lost picture or metric must not cost the training
            self._lost += 1
            logger.warning("not delivered to MLflow: %s", first_line(error))
            logger.debug("", exc_info=True)


class SystemMetricsTracker(NoTracker):
    """Only this node's system metrics; for the first worker of every node that does not hold rank 0."""

    def __init__(self, ref: RunRef, node: str) -> None:
        """Start measuring, in a thread."""
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._start, args=(ref, node), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop measuring."""
        self._thread.join(_CLOSE_SECONDS)
        if self._monitor is not None:
            self._monitor.finish()

    def _start(self, ref: RunRef, node: str) -> None:
        client_of(ref.tracking_uri)
        self._monitor = start_system_metrics(ref, node)


def start_system_metrics(ref: RunRef, node: str) -> Any:
    """MLflow's own monitor; its metrics are named `system/NODE/...`. None if it can't run here."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    try:
        monitor = SystemMetricsMonitor(
            ref.run_id, resume_logging=True, node_id=node, tracking_uri=ref.tracking_uri
        )
        monitor.start()
    except Exception as error:  # nice to have
        logger.warning("no system metrics of %s: %s", node, error)
        return None
    return monitor


def _log_metrics(run_id: str, batch: list[Measured], client: MlflowClient) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), timestamp, step)
        for values, step, timestamp in batch
        for name, value in values.items()
    ]
    for start in range(0, len(metrics), _METRICS_A_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_CALL])


def _log_figure(client: MlflowClient, run_id: str, name: str, figure: Figure) -> None:
    from cvdist.figures.style import save_png

    file = io.BytesIO()
    save_png(figure, file)
    put_file(client, run_id, f"figures/{name}.png", file.getvalue())


def _log_dataset(client: MlflowClient, run_id: str, info: DatasetInfo, digest: str) -> None:
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
        digest=digest[:36],  # as much as MLflow's column takes
        source_type=info.source.partition("://")[0] if "://" in info.source else "local",
        source=json.dumps({"uri": info.source}),
        schema=json.dumps(schema),
        profile=json.dumps(profile),
    )
    context = InputTag("mlflow.data.context", "training and validation")
    client.log_inputs(run_id, [DatasetInput(dataset, [context])])
    client.log_batch(run_id, params=[Param("data.sha256", digest)])
