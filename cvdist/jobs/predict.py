"""Batch prediction in this process, or by Ray Data: actors on all GPUs or CPUs, one slice a task."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvdist import config as configs
from cvdist import log
from cvdist.config import InferenceConfig, PredictConfig, PredictionConfig, SavedModelConfig, TrainConfig
from cvdist.errors import UserError
from cvdist.jobs.train import require_ray, sigterm_raises
from cvdist.prediction import batch, results
from cvdist.prediction.batch import Plan, Predicted
from cvdist.prediction.plan import WorkUnit
from cvdist.prediction.predict import Predictor
from cvdist.prediction.results import Part
from cvdist.results import ModelIdentity
from cvdist.saved import SavedModel, open_model
from cvdist.saved.model import rebuild
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_MEANING = {"data": "pictures", "output": "results"}


@dataclass(frozen=True)
class Finished:
    """A finished prediction, its settings and model, and seconds from start to end."""

    config: PredictConfig
    saved: SavedModel
    predicted: Predicted
    seconds: float


def run(config: PredictConfig) -> Finished:
    """Predict: open the model, look at the pictures, compute what is missing.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
        SystemExit: on SIGTERM; what is finished is kept.
    """
    configs.check_groups(config)
    for name in ("data", "output"):
        if not getattr(config.prediction, name):
            raise UserError(f"--{name} is needed: the folder or URI of the {_MEANING[name]}")
    began = time.monotonic()
    if config.prediction.runtime == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises():
        saved = open_model(config.saved)
        config = dataclasses.replace(_absolute(config), inference=batch.resolved(config.inference, saved))
        todo = batch.make_plan(config, saved)
        logger.info("model      %s, %s", saved.source, saved.identity)
        predicted = predict(config, saved, todo)
    return Finished(config, saved, predicted, time.monotonic() - began)


def _absolute(config: PredictConfig) -> PredictConfig:
    """Actors may run in another folder than the one that relative paths were meant for."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    prediction = config.prediction
    changed = dataclasses.replace(
        prediction, data=absolute(prediction.data), output=absolute(prediction.output)
    )
    return dataclasses.replace(config, prediction=changed)


def predict(config: PredictConfig, saved: SavedModel, todo: Plan) -> Predicted:
    """Predict what is left of `todo`; `config` is resolved.

    Raises:
        UserError: for all that the user can mend.
    """
    inline = config.prediction.runtime == "inline" or not todo.left  # which needs no cluster
    return batch.predict(config, saved, todo, (_here if inline else _on_ray)(config, saved))


def device_here(wanted: str) -> torch.device:
    """The device of this process.

    Raises:
        UserError: if a GPU is asked for that is not there.
    """
    have = torch.cuda.is_available()
    if wanted == "cuda" and not have:
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use")
    return torch.device("cuda", 0) if have and wanted != "cpu" else torch.device("cpu")


def _here(config: PredictConfig, saved: SavedModel) -> batch.Compute:
    def compute(left: Sequence[WorkUnit]) -> Iterator[Part | None]:
        device = device_here(config.inference.device)
        threads = config.inference.decode_workers
        predictor = Predictor(config.prediction.data, config.inference, saved, device, decode_threads=threads)
        target = Folder.open(config.prediction.output, "--output", patient=True)
        logger.info("predicting on %s in this process, %s", device, predictor.precision.name)
        for work in left:
            yield predictor.store(work, target)

    return compute


def _on_ray(config: PredictConfig, saved: SavedModel) -> batch.Compute:
    """Connect, then predict by actors, which take the model from Ray's object store, not from where it was."""
    import ray

    from cvdist.runtime import actor_pool, ray_cluster

    prediction = config.prediction
    needed = configs.replace(
        TrainConfig(),
        # One actor is enough to begin with: Ray's autoscaler may bring more.
        workers=prediction.predictors or 1,
        device=config.inference.device,
        decode_workers=config.inference.decode_workers,
        cpus_per_worker=prediction.cpus_per_worker,
        connect_timeout=prediction.connect_timeout,
        resource_timeout=prediction.resource_timeout,
    )
    ray_cluster.connect(needed, "--predictors")
    pool = actor_pool.plan(needed, prediction.predictors, "--predictors")
    arguments = {
        "config": dataclasses.asdict(config),
        # As bytes, which keep the object for as long as this process lives: Ray may start actors anew.
        "model": ray.cloudpickle.dumps(ray.put(_packed(saved))),
        "use_gpu": pool.use_gpu,
        "decode_threads": pool.decode_threads,
    }

    def compute(left: Sequence[WorkUnit]) -> Iterator[Part | None]:
        logger.info("predicting on %s", pool.describe(len(left)))
        for result in actor_pool.run(pool, _Actor, arguments, [work.to_dict() for work in left]):
            yield None if result is None else results.from_json(result)

    return compute


def _packed(saved: SavedModel) -> dict[str, Any]:
    """Arrays, which the processes of a node share without a copy, and plain values."""
    return {
        "state": {name: tensor.numpy() for name, tensor in saved.model.state_dict().items()},
        "identity": dataclasses.asdict(saved.identity),
        "mean": saved.mean,
        "std": saved.std,
        "source": saved.source,
        "digest": saved.digest,
    }


def _unpacked(values: dict[str, Any]) -> SavedModel:
    identity = ModelIdentity.from_dict(values["identity"])
    with warnings.catch_warnings():
        # Ray's arrays can't be written to, and nobody does: `rebuild` copies them.
        warnings.simplefilter("ignore")
        state = {name: torch.from_numpy(array) for name, array in values["state"].items()}
    model = rebuild(identity, state, values["source"])
    return SavedModel(model, identity, values["mean"], values["std"], values["source"], values["digest"])


class _Actor:
    """A predictor in a process of Ray's. What the user can mend comes back as a row: no retry would help."""

    def __init__(self, config: dict[str, Any], model: bytes, use_gpu: bool, decode_threads: int) -> None:
        import ray

        log.setup()
        chosen = PredictConfig(
            saved=SavedModelConfig(**config["saved"]),
            prediction=PredictionConfig(**config["prediction"]),
            inference=InferenceConfig(**config["inference"]),
        )
        # How many threads PyTorch computes with, Ray has set by the cores of this actor.
        device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
        self._predictor, self._error = None, ""
        try:
            saved = _unpacked(ray.get(ray.cloudpickle.loads(model)))
            self._target = Folder.open(chosen.prediction.output, "--output", patient=True)
            self._predictor = Predictor(
                chosen.prediction.data, chosen.inference, saved, device, decode_threads=decode_threads
            )
        except UserError as error:
            self._error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        (work,) = batch["slice"]
        content, error = b"", self._error
        if self._predictor is not None:
            try:
                content = results.to_json(self._predictor.store(WorkUnit.from_dict(work), self._target))
            except UserError as caught:
                error = str(caught)
        return {"result": [content], "error": [error]}
