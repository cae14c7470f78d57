"""Open the model that the user names: an MLflow run or model, a checkpoint, or a file of weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pyarrow import fs as arrow

from cvdist import models, multilabel, storage
from cvdist.checkpoints import find
from cvdist.checkpoints.format import Normalization
from cvdist.config import ModelConfig, SavedModelConfig
from cvdist.errors import UserError
from cvdist.features.fingerprint import digest
from cvdist.log import redact
from cvdist.models import weights
from cvdist.models.weights import normalizations
from cvdist.results import ModelIdentity
from cvdist.saved.model import SavedModel, rebuild
from cvdist.seeding import derive_seed

_NO_CLASSIFIER_CLASSES = ("random",)


def open_model(settings: SavedModelConfig) -> SavedModel:
    """Open the model that `settings.source` names (`cvdist.config.SavedModelConfig`).

    Raises:
        UserError: If there is no such model, or it is damaged or can't be used.
    """
    source = settings.source
    if not source:
        raise UserError("MODEL is needed: a run's name or id, models:/NAME/VERSION, a checkpoint, or a file")
    named = re.fullmatch(r"([\w-]+):([A-Z]\w+)", source)
    if named and named[1] in models.names():
        if named[2] not in weights.names(named[1]):
            raise UserError(
                f"{source}: torchvision's weights for {named[1]} are "
                f"{', '.join(weights.names(named[1])) or 'none'}"
            )
        return _from_weights(ModelConfig(name=named[1], weights=named[2]), source)
    if source.startswith(("runs:/", "models:/")):
        return _from_mlflow(settings)
    if "://" in source or Path(source).expanduser().exists() or "/" in source:
        return _from_path(settings)
    return _from_mlflow(settings)


def _from_path(settings: SavedModelConfig) -> SavedModel:
    source = settings.source
    filesystem, path = storage.locate(source, "MODEL")
    try:
        kind = filesystem.get_file_info(path).type
    except OSError as error:
        raise UserError(f"{redact(source)} can't be read: {storage.reason(error)}") from error
    if kind == arrow.FileType.NotFound:
        raise UserError(f"{redact(source)}: there is no such file or folder")
    if kind == arrow.FileType.Directory:
        return _from_checkpoint(settings, find.find(source))
    if Path(path).name == "checkpoint.json":
        return _from_checkpoint(settings, source.rpartition("/")[0] or ".")
    if not settings.model:
        raise UserError(
            f"{redact(source)} is a file of weights: name its architecture with --model, a classifier of "
            "torchvision such as mobilenet_v2 or vgg16"
        )
    return _from_weights(
        ModelConfig(
            name=settings.model,
            weights=source,
            weights_preprocessing=settings.weights_preprocessing,
        ),
        redact(source),
    )


def _from_mlflow(settings: SavedModelConfig) -> SavedModel:
    from cvdist.saved.logged import read_logged_model

    found = read_logged_model(settings)
    values = dict(found.metadata)
    mean, std, resize = tuple(values.pop("mean")), tuple(values.pop("std")), values.pop("resize")
    precision, thresholds = values.pop("precision"), tuple(values.pop("thresholds", ()))
    identity = ModelIdentity.from_dict(values)
    model = rebuild(identity, found.state, found.source)
    return SavedModel(
        model,
        identity,
        mean,
        std,
        found.source,
        digest(model.state_dict()),
        run=found.run,
        data=found.data,
        precision=precision,
        model_id=found.model_id,
        resize=resize,
        thresholds=thresholds,
    )


def _from_checkpoint(settings: SavedModelConfig, uri: str) -> SavedModel:
    saved, tensors = find.read(uri)
    normalization = saved.normalization
    if settings.weights_preprocessing:
        stated = normalizations()[settings.weights_preprocessing]
        normalization = Normalization(stated.mean, stated.std, normalization.resize)
    model = rebuild(saved.model, tensors, redact(uri))
    # A checkpoint from before the first validation has none yet.
    unknown = (multilabel.HALF,) * len(saved.model.classes) if saved.model.multilabel else ()
    return SavedModel(
        model,
        saved.model,
        normalization.mean,
        normalization.std,
        redact(uri),
        digest(model.state_dict()),
        resize=normalization.resize,
        thresholds=saved.progress.thresholds or unknown,
    )


def _from_weights(settings: ModelConfig, source: str) -> SavedModel:
    """Open weights of torchvision, or a file that holds a state dict."""
    input = models.find(settings.name).default_input
    try:
        needs = models.preprocessing(settings)
        settings = weights.with_head_of_file(settings)
        expected = models.skeleton(settings)
        found = weights.load(settings, expected, last_layer=True)
    except UserError as error:
        # The message names a flag of training, but here the weights are the positional argument.
        raise UserError(str(error).replace("--weights ", "MODEL ", 1)) from error
    assert needs is not None, "weights are named"
    last = found.state.get(f"{expected.last_layer}.weight")
    classes = _NO_CLASSIFIER_CLASSES if last is None else _classes(settings, len(last))
    identity = models.identity_of(settings, classes, input)
    state = dict(found.state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("classifier"))
        for name, tensor in models.skeleton(settings, len(classes)).state_dict().items():
            if name not in state and name.startswith(f"{expected.head_name}."):
                state[name] = torch.empty(tensor.shape).uniform_(-1, 1) / max(tensor.shape[-1], 1) ** 0.5
            elif name.endswith("num_batches_tracked"):
                # Files from before PyTorch 0.4.1 have no batch counters, which are not used in evaluation mode.
                state.setdefault(name, torch.zeros((), dtype=tensor.dtype))
    model = rebuild(identity, state, source)
    return SavedModel(
        model,
        identity,
        needs.mean,
        needs.std,
        source,
        digest(model.state_dict()),
        resize=needs.resize,
        has_classifier=last is not None,
    )


def _classes(settings: ModelConfig, count: int) -> tuple[str, ...]:
    """Return the class names.

    They are those of the weights or, for a file with as many classes as ImageNet, those of ImageNet, else
    numbers.
    """
    names = weights.class_names(settings)
    return names if len(names) == count else tuple(str(number) for number in range(count))
