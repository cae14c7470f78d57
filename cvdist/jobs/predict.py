"""Batch prediction in this process, or by Ray Data: actors on all GPUs or CPUs, one work unit a task."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvdist import config as configs
from cvdist import log, storage
from cvdist.config import PredictConfig
from cvdist.distributed import device as devices
from cvdist.errors import UserError
from cvdist.jobs import cli, console
from cvdist.prediction import batch, results
from cvdist.prediction.batch import PredictionPlan, Predictions
from cvdist.prediction.plan import WorkUnit
from cvdist.prediction.predict import Predictor
from cvdist.prediction.results import ResultFile
from cvdist.results import ModelIdentity
from cvdist.runtime.installed import require_ray
from cvdist.runtime.signals import sigterm_raises
from cvdist.saved import SavedModel, open_model
from cvdist.saved.model import rebuild
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class PredictResult:
    """A finished prediction: its settings and model, what was predicted, and seconds from start to end."""

    config: PredictConfig
    saved: SavedModel
    predictions: Predictions
    seconds: float


def predict(config: PredictConfig) -> PredictResult:
    """Open the model, look at the pictures, and predict those that have no result yet.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM; what is finished is kept.
    """
    configs.check_groups(config)
    for name, meaning in (("data", "pictures"), ("output", "results")):
        if not getattr(config.prediction, name):
            raise UserError(f"--{name} is needed: the folder or URI of the {meaning}")
    began = time.monotonic()
    if config.runtime.launcher == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises():
        saved = open_model(config.saved)
        config = configs.replace(
            config,
            data=storage.absolute(config.prediction.data),
            output=storage.absolute(config.prediction.output),
        )
        config = dataclasses.replace(config, inference=batch.resolved(config.inference, saved))
        plan = batch.make_plan(config, saved)
        logger.info("model      %s, %s", saved.source, saved.identity)
        predictions = predict_planned(config, saved, plan)
    return PredictResult(config, saved, predictions, time.monotonic() - began)


def predict_planned(config: PredictConfig, saved: SavedModel, plan: PredictionPlan) -> Predictions:
    """Predict what is left of `plan`, which was made with the same settings.

    Raises:
        UserError: for all that the user can correct.
    """
    inline = config.runtime.launcher == "inline" or not plan.left  # which needs no cluster
    return batch.predict(config, saved, plan, (_here if inline else _on_ray)(config, saved))


def _here(config: PredictConfig, saved: SavedModel) -> batch.Compute:
    def compute(left: Sequence[WorkUnit]) -> Iterator[ResultFile | None]:
        device = devices.here(config.inference.device)
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
    from cvdist.runtime.ray_cluster import ResourceRequest

    # One actor is enough to begin with: Ray's autoscaler may bring more.
    predictors = config.prediction.predictors
    request = ResourceRequest(predictors or 1, config.inference.device, config.runtime, "--predictors")
    ray_cluster.connect(request)
    pool = actor_pool.plan(request, predictors, config.inference.decode_workers)
    arguments = {
        "config": configs.to_dict(config),
        # As bytes, which keep the object for as long as this process lives: Ray may start actors again.
        "model": ray.cloudpickle.dumps(ray.put(_packed(saved))),
        "use_gpu": pool.use_gpu,
        "decode_threads": pool.decode_threads,
    }

    def compute(left: Sequence[WorkUnit]) -> Iterator[ResultFile | None]:
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
    """A predictor in a process of Ray's. What the user can correct comes back as a row."""

    def __init__(self, config: dict[str, Any], model: bytes, use_gpu: bool, decode_threads: int) -> None:
        import ray

        log.setup()
        chosen = configs.from_dict(PredictConfig, config)
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


def present(result: PredictResult) -> int:
    """Print what came of the prediction; returns the exit code."""
    cli.show(table(result))
    return 0


def table(result: PredictResult) -> str:
    """What was predicted and where it is, and how to read it."""
    done, saved = result.predictions, result.saved
    output = log.redact(result.config.prediction.output).rstrip("/")
    rate = f", {done.computed / done.seconds:,.1f} images/s" if done.computed else ""
    most = sorted(done.counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} {count:,}" for name, count in most[:_SHOWN_CLASSES] if count)
    more = sum(count > 0 for _, count in most[_SHOWN_CLASSES:])
    stale = f", {done.removed} stale deleted" if done.removed else ""
    size = sum(part.bytes for part in done.parts)
    total = done.rows + len(done.bad)
    rows = [
        ("model", f"{saved.source}: {saved.identity}"),
        ("pictures", f"{done.rows:,} of {total:,}, {len(done.bad)} can't be decoded (quarantine.csv)"),
        ("classes", (named or "none") + (f" and {more} more" if more else "")),
        ("computed", f"{done.computed:,} pictures in {log.duration(done.seconds)}{rate}"),
        ("results", f"{output}/predictions: {len(done.parts)} files, {size / 1e6:,.2f} MB{stale}"),
        ("time", f"{log.duration(result.seconds)} in all"),
    ]
    read = f"python -c \"import pandas; print(pandas.read_parquet('{output}/predictions'))\""
    return "\n".join([*console.aligned(rows), f"next: {read}"])
