"""MLflow stores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.helpers import session

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def empty_store(folder: Path) -> Path:
    """Put an MLflow store without experiments into `folder`, which saves the seconds that making one takes.

    Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(session.once("empty-store", _make), folder / "mlflow.db")
    return folder


def the_run(storage: Path, name: str = "") -> tuple[MlflowClient, Run]:
    """The only run in the MLflow store in `storage`, or the only one with `name`, and a client of the store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("cvdist").experiment_id
    (found,) = client.search_runs([experiment], f"tags.`cvdist.name` = '{name}'" if name else "")
    return client, found


def _make(folder: Path) -> Path:
    from mlflow import MlflowClient

    database = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database
