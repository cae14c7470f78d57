"""MLflow stores."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers import session


def empty_store(folder: Path) -> Path:
    """Put an MLflow store without experiments into `folder`, which saves the seconds that making one takes.

    Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(session.once("empty-store", _make), folder / "mlflow.db")
    return folder


def _make(folder: Path) -> Path:
    from mlflow import MlflowClient

    database = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database
