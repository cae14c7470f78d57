"""Evaluation in this process."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from cvdist import config as configs
from cvdist import log
from cvdist.config import EvaluateConfig
from cvdist.errors import UserError
from cvdist.evaluation import measure
from cvdist.evaluation.measure import Evaluation
from cvdist.jobs.predict import device_here
from cvdist.jobs.train import sigterm_raises
from cvdist.saved import open_model
from cvdist.tracking import RunRef

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A finished evaluation: its run, the registered version (`models:/NAME/VERSION@ALIAS`), and seconds."""

    config: EvaluateConfig
    evaluation: Evaluation
    run: RunRef | None
    registered: str
    seconds: float


def run(config: EvaluateConfig) -> Finished:
    """Evaluate, log, write, register.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
    """
    began = time.monotonic()
    configs.check_groups(config)
    asked = config.evaluation
    if asked.register:
        configs.check_registration(asked.register, asked.alias)
    config = _absolute(config)
    with sigterm_raises():
        device = device_here(config.inference.device)
        saved = open_model(config.saved)
        if asked.register and not (saved.run and saved.model_id):
            raise UserError(
                f"--register is for models that an MLflow run has logged, and {saved.source} is none: name "
                "the run"
            )
        store = None
        if asked.tracking == "required":
            from cvdist.jobs import evaluation_run

            store = evaluation_run.store_of(config)
        evaluation = measure.evaluate(config, saved, device)
        if asked.output:
            measure.write_json(config.evaluation.output, evaluation)
        ref = evaluation_run.log_evaluation(store, evaluation) if store is not None else None
        registered = _register(config, evaluation) if asked.register else ""
    return Finished(config, evaluation, ref, registered, time.monotonic() - began)


def _register(config: EvaluateConfig, evaluation: Evaluation) -> str:
    from cvdist.tracking import registry

    saved, found = evaluation.first.saved, evaluation.first.metrics
    assert saved.run is not None
    result = log.percent(found.correct, found.total)
    name, alias = config.evaluation.register, config.evaluation.alias
    version = registry.register(
        saved.run,
        saved.model_id,
        name,
        alias,
        description=f"{result} on {evaluation.pictures.name}; {saved.identity}",
        tags={"evaluation": result, "evaluation.data": evaluation.pictures.name, "digest": saved.digest},
    )
    return f"{version} @{alias}"


def _absolute(config: EvaluateConfig) -> EvaluateConfig:
    data = config.evaluation.data
    if not data or "://" in data:
        return config
    absolute = str(Path(data).expanduser().absolute())
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, data=absolute))
