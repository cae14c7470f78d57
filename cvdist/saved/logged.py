"""Models logged to MLflow: find them by run, name or registry entry, and read them without pickle."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cvdist.config import DataConfig, SavedModelConfig
from cvdist.errors import UserError, did_you_mean
from cvdist.features.fingerprint import digest
from cvdist.log import redact
from cvdist.results import ModelIdentity
from cvdist.saved.model import SavedModel, rebuild
from cvdist.tracking import environment
from cvdist.tracking.find import existing_store, look_up_run
from cvdist.tracking.run import RunRef, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
_CLASSIFIER = "classifier."  # prefix of the model's tensors in a `ServableClassifier`
_MOST_NAMES = 1000  # how many names are compared with one that does not exist


def open_logged_model(settings: SavedModelConfig) -> SavedModel:
    """Open the model that `settings.source` names: a run's id or name, `runs:/ID`, or `models:/...`.

    Raises:
        UserError: If the store, the run or the model does not exist, or the model was not logged by cvdist.
    """
    prefix = f"{redact(settings.source)} is not a file or folder, and "
    with existing_store(settings, prefix) as (uri, client):
        if settings.source.startswith("models:/"):
            model_id, location, run_id = _registered(client, settings)
        else:
            word = settings.source.removeprefix("runs:/").strip("/").split("/")[0]
            run = look_up_run(client, settings.experiment, word)
            model_id, location, run_id = *_of_run(client, run), run.info.run_id
        ref, data, named = _origin(client, uri, run_id)
    source = redact(settings.source if settings.source.startswith("models:/") else f"runs:/{run_id}")
    values, state = _read(location, uri, f"the model {source}")
    source += f" ({named})" if named else ""
    mean, std, resize = tuple(values.pop("mean")), tuple(values.pop("std")), values.pop("resize")
    precision, thresholds = values.pop("precision"), tuple(values.pop("thresholds", ()))
    identity = ModelIdentity.from_dict(values)
    model = rebuild(identity, state, source)
    return SavedModel(
        model,
        identity,
        mean,
        std,
        source,
        digest(model.state_dict()),
        run=ref,
        data=data,
        precision=precision,
        model_id=model_id,
        resize=resize,
        thresholds=thresholds,
    )


def _of_run(client: MlflowClient, run: Any) -> tuple[str, str]:
    """Return the id and the artifact location of the best model that a run has logged."""
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        name = run.info.run_name
        raise UserError(
            f"the run {name} ({run.info.status.lower()}) has no model, only {_contents(client, run)}: train it "
            f"with --log-model, or name its checkpoints, STORAGE/{name}"
        )
    # A resumed run may have logged a second, better model.
    best = max(outputs, key=lambda output: output.step)
    return best.model_id, client.get_logged_model(best.model_id).artifact_location


def _contents(client: MlflowClient, run: Any) -> str:
    files = len(client.list_artifacts(run.info.run_id, "figures"))
    return f"{len(run.data.metrics)} metrics and {files} figures"


def _registered(client: MlflowClient, settings: SavedModelConfig) -> tuple[str, str, str]:
    """Return the model id, artifact location and run id of a model in the registry.

    The model is named as `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/m-ID`.
    """
    from mlflow.exceptions import MlflowException

    word = settings.source.removeprefix("models:/").strip("/")
    if _MODEL_ID.fullmatch(word):
        model = client.get_logged_model(word)
        return word, model.artifact_location, model.source_run_id or ""
    name, alias = (word.partition("@")[0], word.partition("@")[2]) if "@" in word else (word, "")
    version = ""
    if not alias:
        name, _, version = word.rpartition("/")
    if not name or not (alias or version):
        raise UserError(f"{settings.source}: a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(found.name for found in client.search_registered_models(max_results=_MOST_NAMES))
        hint = did_you_mean(name, names, f"there are: {', '.join(names[:5]) or 'none'}")
        raise UserError(f"{settings.source}: no model is registered as {name!r}: {hint}") from error
    try:
        found = (
            client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        )
    except MlflowException as error:
        have = [f"@{other}" for other in sorted(registered.aliases)]
        have += sorted((one.version for one in client.search_model_versions(f"name='{name}'")), key=int)[-5:]
        missing = f"alias {alias!r}" if alias else f"version {version!r}"
        raise UserError(
            f"{settings.source}: the model {name} has no {missing}, it has "
            f"{', '.join(map(str, have)) or 'none'}"
        ) from error
    # Database stores keep the model's id only in the source of the version.
    logged = found.model_id or (found.source or "").removeprefix("models:/")
    if _MODEL_ID.fullmatch(logged):
        return logged, client.get_logged_model(logged).artifact_location, found.run_id or ""
    return "", client.get_model_version_download_uri(name, found.version), found.run_id or ""


def _origin(client: MlflowClient, uri: str, run_id: str) -> tuple[RunRef | None, DataConfig | None, str]:
    """Return the run that logged a model, the data that it was trained on, and its name."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException:  # the run was deleted
        run = None
    if run is None:
        return None, None, ""
    ref = RunRef(uri, run.info.experiment_id, run_id)
    return ref, _data(run.data.params, run.data.tags), run.info.run_name


def _data(params: Mapping[str, str], tags: Mapping[str, str]) -> DataConfig | None:
    """Read the data settings from a run's parameters.

    A resumed run has newer values of changed parameters in its tags.
    """
    if "data.dataset" not in params:
        return None
    values = {}
    for key, default in dataclasses.asdict(DataConfig()).items():
        name = f"data.{key}"
        text = tags.get(f"changed.{name}", params.get(name))
        if text is not None:
            values[key] = type(default)(text)  # no field is a bool
    return DataConfig(**values)


def _read(location: str, uri: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and tensors of a model at `location`.

    Raises:
        UserError: If the model can't be read, or was not logged by cvdist.
    """
    import mlflow
    from mlflow.models import Model

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory(prefix="cvdist-model-") as folder:
        try:
            path = mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=uri)
        except Exception as error:
            raise UserError(f"{name} can't be read from {redact(location)}: {first_line(error)}") from error
        found = Model.load(path)
        metadata = (found.metadata or {}).get("cvdist")
        if not metadata:
            raise UserError(f"{name} was not logged by cvdist: its metadata has no architecture and no classes")
        try:
            # MLflow refuses pickles, also those inside a .pt2 file, unless an environment variable allows them.
            with environment.variables(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false"):
                state = mlflow.pytorch.load_model(f"{path}/artifacts/network").state_dict()
        except Exception as error:
            raise UserError(f"{name} is damaged or not in PyTorch's pt2 format: {first_line(error)}") from error
    tensors = {
        key.removeprefix(_CLASSIFIER): tensor for key, tensor in state.items() if key.startswith(_CLASSIFIER)
    }
    return dict(metadata), tensors
