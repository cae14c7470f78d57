"""A journal of metrics that could not be delivered to MLflow yet.

It is a file of JSON lines, oldest first. The first line names the run; each further line has the metrics of one
step and the time at which they were measured. If a job has ended without MLflow, `jobs/replay.py` delivers
them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvdist.errors import UserError
from cvdist.log import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_METRICS_PER_CALL = 1000  # limit of MLflow

# All metrics of an epoch, of a step or of an attempt are logged in one call, so one name of each group is
# enough to tell whether a step was delivered.
_MARKERS = ("valid/loss", "step/loss", "run/attempt")


@dataclass(frozen=True)
class StepMetrics:
    """Metrics that were measured at the same time.

    Attributes:
        values: The values, by the names of the metrics.
        step: Step of the run, which is an epoch for metrics of epochs.
        time: Time of measurement, in milliseconds since 1970.
    """

    values: dict[str, float]
    step: int
    time: int


@dataclass(frozen=True)
class JournalContents:
    """The contents of a journal.

    Attributes:
        tracking_uri: Address of the MLflow store.
        run_id: Id of the run.
        metrics: The metrics, oldest first.
        finished: Whether training was finished when the journal was closed.
    """

    tracking_uri: str
    run_id: str
    metrics: list[StepMetrics]
    finished: bool


class Journal:
    """The journal of one run on one node, written by one process."""

    def __init__(self, path: Path | None, tracking_uri: str, run_id: str) -> None:
        """Prepare a journal; the file is created by the first `append`.

        Args:
            path: The file. None: nothing is ever written.
            tracking_uri: Address of the MLflow store.
            run_id: Id of the run.
        """
        self.path = path
        self._head = {"tracking_uri": redact(tracking_uri), "run_id": run_id}

    def undelivered(self) -> list[StepMetrics]:
        """Return the metrics that an earlier process of this run could not deliver from this node."""
        if self.path is None:
            return []
        try:
            return parse(self.path.read_text(), str(self.path)).metrics
        except FileNotFoundError:
            return []
        except (OSError, UserError) as error:
            logger.warning("a journal of metrics can't be read and is ignored: %s", error)
            return []

    def append(self, metrics: Sequence[StepMetrics], *, finished: bool = False) -> None:
        """Append `metrics`, and with `finished` a mark that training is finished.

        If the file can't be written, a warning is logged and training goes on.
        """
        lines: list[dict[str, Any]] = [
            {"step": item.step, "time": item.time, "values": item.values} for item in metrics
        ]
        if finished:
            lines.append({"finished": True})
        if self.path is None or not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                lines.insert(0, self._head)
            with self.path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            logger.warning("metrics can't be kept in %s: %s", self.path, error.strerror)

    def clear(self) -> None:
        """Delete the file, after all its metrics were delivered."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def parse(text: str, name: str) -> JournalContents:
    """Parse the text of a journal. An incomplete last line is ignored.

    Args:
        text: Content of the file.
        name: Name of the file, for error messages.

    Raises:
        UserError: If the text is not that of a journal.
    """
    lines = text.split("\n")
    complete = lines[:-1]  # a text after the last line end is an incomplete line
    try:
        head, *rest = [json.loads(line) for line in complete]
        metrics = [
            StepMetrics(
                {str(key): float(value) for key, value in line["values"].items()},
                int(line["step"]),
                int(line["time"]),
            )
            for line in rest
            if "finished" not in line
        ]
        finished = any("finished" in line for line in rest)
        return JournalContents(str(head["tracking_uri"]), str(head["run_id"]), metrics, finished)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not a journal of metrics ({type(error).__name__})") from error


class MetricDelivery:
    """Delivers metrics to a run in order and exactly once, across restarts of the job and of the server."""

    def __init__(self, run_id: str) -> None:
        """Prepare for the run `run_id`. Which metrics it has already is looked up by the first delivery."""
        self._run_id = run_id
        self._delivered: dict[str, set[int]] | None = None

    def deliver(self, client: MlflowClient, metrics: Sequence[StepMetrics]) -> None:
        """Log the metrics that the run does not have yet.

        Raises:
            Exception: Any error of MLflow. The next call looks up which metrics the server has received until
                then.
        """
        from mlflow.entities import Metric

        if self._delivered is None:
            self._delivered = self._look_up(client)
        delivered, self._delivered = self._delivered, None  # not known until all calls below have succeeded
        batch: list[Any] = []
        for item in metrics:
            marker = next((name for name in _MARKERS if name in item.values), None)
            if marker is not None:
                if item.step in delivered[marker]:
                    continue
                delivered[marker].add(item.step)
            # The metrics of a step go into the same call, so that the marker never arrives without the others.
            if len(batch) + len(item.values) > _METRICS_PER_CALL:
                client.log_batch(self._run_id, metrics=batch)
                batch = []
            batch += [Metric(name, float(value), item.time, item.step) for name, value in item.values.items()]
        if batch:
            client.log_batch(self._run_id, metrics=batch)
        self._delivered = delivered

    def _look_up(self, client: MlflowClient) -> dict[str, set[int]]:
        """Return the steps that the run has, by marker."""
        return {
            marker: {metric.step for metric in client.get_metric_history(self._run_id, marker)}
            for marker in _MARKERS
        }
