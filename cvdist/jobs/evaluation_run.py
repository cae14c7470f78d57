"""An evaluation as an MLflow run of its own, below the run that trained the model."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from cvdist.config import EvaluateConfig, TrainConfig, replace
from cvdist.evaluation import page
from cvdist.tracking import environment, open_tracker
from cvdist.tracking.run import (
    RunRef,
    end_run_on_exit,
    first_line,
    mlflow_client,
    open_tracking_store,
    set_description,
)
from cvdist.training.reporting import quarantine_table

if TYPE_CHECKING:
    from cvdist.evaluation.measure import Evaluation

logger = logging.getLogger(__name__)


def store_of(config: EvaluateConfig) -> tuple[str, str] | None:
    """Address and experiment to log to; None with `--tracking none`. Asked before anything is computed.

    Raises:
        UserError: if the store can't be reached or written.
    """
    saved = config.saved
    store = open_tracking_store(
        replace(
            TrainConfig(),
            tracking=config.evaluation.tracking,
            tracking_uri=saved.tracking_uri,
            tracking_timeout=saved.tracking_timeout,
            experiment=saved.experiment,
            storage=saved.storage,
        )
    )
    return (store.tracking_uri, store.experiment_id) if store is not None else None


def log_evaluation(store: tuple[str, str], evaluation: Evaluation) -> RunRef:
    """Log metrics, figures and tables; returns the run, which is ended."""
    uri, experiment = store
    saved = evaluation.first.saved
    trained_by = saved.run if saved.run is not None and saved.run.tracking_uri == uri else None
    tags = {
        "cvdist.kind": "evaluation",
        "cvdist.model": saved.source,
        "cvdist.model_digest": saved.digest,
        **environment.run_tags(),
    }
    if trained_by is not None:
        experiment = trained_by.experiment_id
        tags |= {"cvdist.trained_by": trained_by.run_id, "mlflow.parentRunId": trained_by.run_id}
    second = evaluation.second
    if second is not None:
        tags["cvdist.compared_with"] = second.saved.source
    client = mlflow_client(uri)
    run = client.create_run(experiment, run_name=f"evaluation of {saved.name}", tags=tags)
    ref = RunRef(uri, experiment, run.info.run_id, system_metrics=False, log_model=False)
    with end_run_on_exit(ref):
        tracker = open_tracker(ref, 0, 0, "")
        tracker.log_params(
            {
                "model": saved.source,
                "data": evaluation.pictures.name,
                "precision": evaluation.first.arithmetic,
                "compared_with": second.saved.source if second is not None else "",
            }
        )
        values = page.values(evaluation.first.metrics)
        if evaluation.comparison is not None and second is not None:
            values |= {f"second_{name}": value for name, value in page.values(second.metrics).items()}
            values["comparison/mcnemar_p"] = evaluation.comparison.p
        tracker.log_metrics(values, step=0)
        for name, draw in page.figures(evaluation).items():
            tracker.log_figure(name, draw)
        tracker.log_text("classes.csv", page.class_table(evaluation.first.metrics))
        tracker.log_text("evaluation.json", json.dumps(evaluation.to_dict(), indent=1))
        if evaluation.pictures.quarantine:
            tracker.log_text("quarantine.csv", quarantine_table(evaluation.pictures.quarantine))
        tracker.close()
        _link(ref, saved.model_id)
        set_description(ref, page.description(evaluation, environment.command()))
    return ref


def _link(ref: RunRef, model_id: str) -> None:
    """Show the run on the logged model's page, and the model on the run's."""
    if not model_id:
        return
    from mlflow.entities import LoggedModelInput

    try:
        mlflow_client(ref.tracking_uri).log_inputs(ref.run_id, models=[LoggedModelInput(model_id)])
    except Exception as error:  # nice to have
        logger.warning("the model was not linked with its evaluation in MLflow: %s", first_line(error))
