"""Register logged models in the model registry of MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.tracking.run import RunRef, default_store, first_line, mlflow_client, short_retries

_TIMEOUT = 30.0  # seconds for one answer of the registry


def register(
    ref: RunRef, model_id: str, name: str, alias: str, *, description: str, tags: Mapping[str, str]
) -> str:
    """Register a logged model as a version of a registered model, and set an alias for that version.

    A model that is registered already keeps its version number; description and tags are updated.

    Args:
        ref: The run that logged the model.
        model_id: MLflow's id of the logged model.
        name: Name of the registered model.
        alias: Alias for the version.
        description: Description of the version.
        tags: Tags of the version.

    Returns:
        `models:/NAME/VERSION`.

    Raises:
        UserError: If the registry refuses.
    """
    from mlflow.exceptions import MlflowException

    try:
        # Some of these calls look up the model in the default store.
        with short_retries(_TIMEOUT), default_store(ref.tracking_uri):
            client = mlflow_client(ref.tracking_uri)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"models:/{model_id}"
            versions = [v for v in client.search_model_versions(f"name='{name}'") if v.source == source]
            if versions:
                version = str(versions[0].version)
                client.update_model_version(name, version, description)
                for key, value in tags.items():
                    client.set_model_version_tag(name, version, key, value)
            else:
                made = client.create_model_version(
                    name, source, ref.run_id, tags=dict(tags), description=description, model_id=model_id
                )
                version = str(made.version)
            client.set_registered_model_alias(name, alias, version)
    except Exception as error:  # MLflow passes on errors of databases, proxies and permissions of any type
        raise UserError(
            f"--register {name}: the MLflow registry of {redact(ref.tracking_uri)} refused: "
            f"{first_line(error)}. The run and its model are stored: repair the registry, and register with "
            f"python jobs/evaluate.py runs:/{ref.run_id} --register {name} --alias {alias}"
        ) from error
    return f"models:/{name}/{version}"


def best_logged(ref: RunRef) -> str:
    """Return MLflow's id of the best model that a run has logged.

    Raises:
        UserError: If the run has logged no model.
    """
    outputs = mlflow_client(ref.tracking_uri).get_run(ref.run_id).outputs
    models = outputs.model_outputs if outputs else []
    if not models:
        raise UserError(f"--register: the run {ref.run_id} has no model: train it with --log-model")
    return str(max(models, key=lambda output: output.step).model_id)
