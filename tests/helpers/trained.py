"""A few runs that are trained once, for the tests of what is done with trained models."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlflow

from cvdist import config as configs
from cvdist import recipes
from cvdist.config import SavedModelConfig
from cvdist.jobs.train import TrainResult, train
from tests.helpers.jobs import mlflow_store

REGISTERED = "digit-reader"


@dataclass(frozen=True)
class Trained:
    """storage: of the runs `good` (registered as REGISTERED@candidate), `averaged` and `weak`."""

    storage: Path
    good: TrainResult
    averaged: TrainResult
    weak: TrainResult

    def copy(self, storage: Path) -> Trained:
        """The same runs in another store, which knows where their artifacts lie."""
        shutil.copytree(self.storage, storage, ignore=shutil.ignore_patterns("mlruns", "artifacts"))
        return Trained(storage, *(self._moved(run, storage) for run in (self.good, self.averaged, self.weak)))

    def _moved(self, result: TrainResult, storage: Path) -> TrainResult:
        assert result.run is not None
        run = dataclasses.replace(
            result.run, tracking_uri=f"sqlite:///{storage}/mlflow.db", folder=f"{storage}/{result.name}"
        )
        return dataclasses.replace(result, run=run, storage=str(storage))

    def saved(self, source: object, **changes: str) -> SavedModelConfig:
        """Settings that look for `source` in this storage."""
        return SavedModelConfig(source=str(source), storage=str(self.storage), **changes)

    def served(self, run: TrainResult) -> mlflow.pyfunc.PyFuncModel:
        """The logged model as it is served: files or uint8 pixels to class names and probabilities."""
        client = mlflow.MlflowClient(run.run.tracking_uri)
        best = max(client.get_run(run.run.run_id).outputs.model_outputs, key=lambda output: output.step)
        with mlflow_store(self.storage):
            return mlflow.pyfunc.load_model(f"models:/{best.model_id}")


def train_all(storage: Path) -> Trained:
    """In this process, a few seconds each."""

    def run(name: str, **changes: object) -> TrainResult:
        config = configs.replace(
            recipes.find("digits-cnn"),
            **{
                "name": name,
                "storage": str(storage),
                "runtime": "inline",
                "system_metrics": False,
                "visualize": False,
                "epochs": 1,
                "batch_size": 100,
                "lr": 0.05,
                **changes,
            },
        )
        finished = train(config)
        assert finished is not None
        return finished

    return Trained(
        storage,
        good=run("good", epochs=2, register=REGISTERED),
        averaged=run("averaged", model_ema_decay=0.9, keep_checkpoints=2),
        weak=run("weak", lr=0.001, log_model=False, batch_size=500),
    )
