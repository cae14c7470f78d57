"""Metrics that MLflow has not taken yet: JSON lines in a file, oldest first, with the times of measurement.

The first line names the run. `jobs/replay.py` delivers what is left when a job has ended without MLflow.
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

_METRICS_A_CALL = 1000  # MLflow's own limit

# The metrics of an epoch and those of a step come together: one name of each tells which are there.
_MARKERS = ("valid/loss", "step/loss", "run/attempt")


@dataclass(frozen=True)
class Measured:
    """Metrics of one moment. step: of the run; time: milliseconds since 1970."""

    values: dict[str, float]
    step: int
    time: int


@dataclass(frozen=True)
class Kept:
    """A journal's contents. finished: whether training was done when it was closed."""

    tracking_uri: str
    run_id: str
    metrics: list[Measured]
    finished: bool


class Journal:
    """The journal of one run on one node. One process writes it, one line a call, whole or not at all."""

    def __init__(self, path: Path | None, tracking_uri: str, run_id: str) -> None:
        """Nothing is written until something is to be kept; without a path, never."""
        self.path = path
        self._head = {"tracking_uri": redact(tracking_uri), "run_id": run_id}

    def left(self) -> list[Measured]:
        """What an earlier process of this run could not deliver from this node."""
        if self.path is None:
            return []
        try:
            return parse(self.path.read_text(), str(self.path)).metrics
        except FileNotFoundError:
            return []
        except (OSError, UserError) as error:
            logger.warning("a journal of metrics can't be read and is left alone: %s", error)
            return []

    def append(self, metrics: Sequence[Measured], *, finished: bool = False) -> None:
        """Keep `metrics`. A disk that is full costs the journal, not the training."""
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
        """All is delivered."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def parse(text: str, name: str) -> Kept:
    """Contents of a journal called `name`; a last line that was cut is left out.

    Raises:
        UserError: if it is none.
    """
    lines = text.split("\n")
    whole = lines[:-1]  # what follows the last line end was cut
    try:
        head, *rest = [json.loads(line) for line in whole]
        metrics = [
            Measured(
                {str(key): float(value) for key, value in line["values"].items()},
                int(line["step"]),
                int(line["time"]),
            )
            for line in rest
            if "finished" not in line
        ]
        finished = any("finished" in line for line in rest)
        return Kept(str(head["tracking_uri"]), str(head["run_id"]), metrics, finished)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is no journal of metrics ({type(error).__name__})") from error


class Delivery:
    """Brings metrics into a run in order, and each of them once, over restarts of the job and of the server."""

    def __init__(self, run_id: str) -> None:
        """Knows nothing of the run yet."""
        self._run_id = run_id
        self._there: dict[str, set[int]] | None = None

    def deliver(self, client: MlflowClient, metrics: Sequence[Measured]) -> None:
        """Log those that the run does not have.

        Raises:
            Exception: as MLflow raises it. What the server took before an error, the next call finds out.
        """
        from mlflow.entities import Metric

        if self._there is None:
            self._there = self._look_up(client)
        there, self._there = self._there, None  # unknown, until this has gone well
        batch: list[Any] = []
        for item in metrics:
            marker = next((name for name in _MARKERS if name in item.values), None)
            if marker is not None:
                if item.step in there[marker]:
                    continue
                there[marker].add(item.step)
            # A moment's metrics go together: its marker never arrives without the others.
            if len(batch) + len(item.values) > _METRICS_A_CALL:
                client.log_batch(self._run_id, metrics=batch)
                batch = []
            batch += [Metric(name, float(value), item.time, item.step) for name, value in item.values.items()]
        if batch:
            client.log_batch(self._run_id, metrics=batch)
        self._there = there

    def _look_up(self, client: MlflowClient) -> dict[str, set[int]]:
        return {
            marker: {metric.step for metric in client.get_metric_history(self._run_id, marker)}
            for marker in _MARKERS
        }
