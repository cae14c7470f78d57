"""Open the model that the user names: an MLflow run or model, a checkpoint, or a file of weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pyarrow import fs as arrow

from cvdist import models, storage
from cvdist.checkpoints import find
from cvdist.checkpoints.format import Normalization
from cvdist.config import ModelConfig, SavedModelConfig
from cvdist.errors import UserError
from cvdist.features.fingerprint import digest
from cvdist.log import redact
from cvdist.models import heads, weights
from cvdist.models.registry import BLOCKS
from cvdist.models.weights import PREPROCESSING
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
        return _from_weights(ModelConfig(name=named[1], weights=named[2], trainable_blocks=BLOCKS), source)
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
            f"{redact(source)} is a file of weights: name its architecture with --model, one of "
            f"{', '.join(name for name in models.names() if models.find(name).pretrained)}"
        )
    return _from_weights(
        ModelConfig(
            name=settings.model,
            weights=source,
            weights_preprocessing=settings.weights_preprocessing,
            trainable_blocks=BLOCKS,
        ),
        redact(source),
    )


def _from_mlflow(settings: SavedModelConfig) -> SavedModel:
    from cvdist.saved.logged import read_logged_model

    found = read_logged_model(settings)
    values = dict(found.metadata)
    mean, std = tuple(values.pop("mean")), tuple(values.pop("std"))
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
        precision=found.precision,
        model_id=found.model_id,
    )


def _from_checkpoint(settings: SavedModelConfig, uri: str) -> SavedModel:
    saved, tensors = find.read(uri)
    normalization = saved.normalization
    if settings.weights_preprocessing:
        stated = PREPROCESSING[settings.weights_preprocessing]
        normalization = Normalization(stated.mean, stated.std)
    model = rebuild(saved.model, tensors, redact(uri))
    return SavedModel(
        model, saved.model, normalization.mean, normalization.std, redact(uri), digest(model.state_dict())
    )


def _from_weights(settings: ModelConfig, source: str) -> SavedModel:
    """Open weights of torchvision, or a file that holds a state dict."""
    input = models.find(settings.name).default_input
    try:
        normalization = models.preprocessing(settings)
        settings = weights.with_head_of_file(settings)
        expected = models.skeleton(settings).state_dict()
        found = weights.load(settings, expected, last_layer=True)
    except UserError as error:
        # The message names a flag of training, but here the weights are the positional argument.
        raise UserError(str(error).replace("--weights ", "MODEL ", 1)) from error
    assert normalization is not None, "weights are named"
    last = found.state.get(f"{heads.last_layer(expected)}bias")
    classes = _NO_CLASSIFIER_CLASSES if last is None else _classes(settings, len(last))
    identity = ModelIdentity(
        settings.name, classes, input.channels, input.height, input.width, *models.head_of(settings)
    )
    state = dict(found.state)
    if last is None:
        expected = models.skeleton(settings, len(classes)).state_dict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("classifier"))
            for name, tensor in expected.items():
                if name not in state and name.startswith("classifier."):
                    state[name] = torch.empty(tensor.shape).uniform_(-1, 1) / max(tensor.shape[-1], 1) ** 0.5
    for name, tensor in expected.items():
        # Files from before PyTorch 0.4.1 have no batch counters, which are not used in evaluation mode.
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros((), dtype=tensor.dtype))
    model = rebuild(identity, state, source)
    return SavedModel(
        model,
        identity,
        normalization.mean,
        normalization.std,
        source,
        digest(model.state_dict()),
        has_classifier=last is not None,
    )


def _classes(settings: ModelConfig, count: int) -> tuple[str, ...]:
    """Return the class names.

    They are those of the weights or, for a file with as many classes as ImageNet, those of ImageNet, else
    numbers.
    """
    names = weights.class_names(settings) or weights.class_names(
        ModelConfig(name=settings.name, weights="IMAGENET1K_V1")
    )
    return names if len(names) == count else tuple(str(number) for number in range(count))
