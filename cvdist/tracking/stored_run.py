"""What MLflow has about a run, as plain values."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvdist.tracking.run import FIRST_STEP, mlflow_client, short_retries

if TYPE_CHECKING:
    from types import TracebackType

REQUEST_SECONDS = 30.0


@dataclass(frozen=True)
class LoggedDataset:
    """The data set that a run has logged as its input, with its profile and schema."""

    name: str
    source: str
    digest: str
    profile: Mapping[str, Any]
    schema: Mapping[str, Any]


class StoredRun:
    """A run in MLflow, read when something is asked for; to be used in a `with` block.

    Args:
        tracking_uri: address of the store.
        run_id: id of the run.

    Raises:
        Exception: MLflow's own, if the store or the run does not exist.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.run_id = run_id
        self._open = ExitStack()
        self._client = mlflow_client(tracking_uri)

    def __enter__(self) -> StoredRun:
        """Read names, tags, parameters and metrics of the run. From here on, MLflow does not retry for long."""
        self._open.enter_context(short_retries(REQUEST_SECONDS))
        try:
            self._folder = Path(
                self._open.enter_context(tempfile.TemporaryDirectory(prefix="cvdist-stored-run-"))
            )
            run = self._client.get_run(self.run_id)
        except BaseException:
            self._open.close()
            raise
        self.name = run.info.run_name or self.run_id
        self.finished = run.info.status == "FINISHED"
        self.status = run.info.status.lower()
        self.started = (run.info.start_time or 0) / 1000  # seconds since 1970, 0 where that is unknown
        self.tags: Mapping[str, str] = run.data.tags
        self.metrics: Mapping[str, float] = run.data.metrics
        self.first_step_seconds: float | None = run.data.metrics.get(FIRST_STEP)
        # The newest values: a continued run keeps its changed parameters in tags.
        changed = {
            key.removeprefix("changed."): value
            for key, value in run.data.tags.items()
            if key.startswith("changed.")
        }
        self.params: Mapping[str, str] = {**run.data.params, **changed}
        inputs = run.inputs.dataset_inputs if run.inputs else []
        self.dataset: LoggedDataset | None = None
        if inputs:
            found = inputs[0].dataset
            source = str(_json(found.source).get("uri", ""))
            self.dataset = LoggedDataset(
                found.name, source, found.digest, _json(found.profile), _json(found.schema)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete what was downloaded."""
        self._open.close()

    def history(self, metric: str) -> dict[int, float]:
        """Return the newest value of a metric by step."""
        points = self._client.get_metric_history(self.run_id, metric)
        return {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}

    def files(self, folder: str = "", depth: int = 1) -> dict[str, int]:
        """Return size in bytes of each artifact below `folder` by path, in up to `depth` levels of folders."""
        found = {}
        for entry in self._client.list_artifacts(self.run_id, folder or None):
            if not entry.is_dir:
                found[entry.path] = int(entry.file_size or 0)
            elif depth > 1:
                found |= self.files(entry.path, depth - 1)
        return found

    def read(self, path: str) -> bytes:
        """Return the content of an artifact."""
        file = Path(self._client.download_artifacts(self.run_id, path, str(self._folder)))
        content = file.read_bytes()
        file.unlink()
        return content

    def read_table(self, path: str) -> list[list[str]]:
        """Return the rows of a CSV file among the artifacts, without its header; none without the file."""
        if path not in self.files():
            return []
        text = self.read(path).decode(errors="replace")
        return list(csv.reader(io.StringIO(text)))[1:]


def put_text(tracking_uri: str, run_id: str, name: str, text: str) -> None:
    """Put a text among a run's artifacts; raises MLflow's own errors."""
    with short_retries(REQUEST_SECONDS):
        mlflow_client(tracking_uri).log_text(run_id, text, name)


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
