"""A trained model with what is known about it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cvdist import models
from cvdist.config import DataConfig, PrecisionName
from cvdist.errors import UserError
from cvdist.results import ModelIdentity
from cvdist.tracking import RunRef


@dataclass(frozen=True)
class SavedModel:
    """A trained classifier.

    Attributes:
        model: The architecture of the registry with its own layer names, in evaluation mode, float32, on the
            CPU. Takes normalized pictures (n, C, H, W) and returns scores or log-probabilities (n, classes).
        identity: Architecture, classes and input shape.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        source: Where the model comes from, for messages.
        digest: SHA-256 of its tensors (`cvdist.features.fingerprint.digest`).
        run: The MLflow run that trained it, if it is known.
        data: The data that the run was trained on, if it is known.
        precision: The precision that the run was trained in; `auto` if it is not known.
        model_id: MLflow's id of a logged model, else empty.
        resize: How pictures are brought to the model's size, as `PicturesConfig.resize`; empty if not known.
        has_classifier: Whether the classifier was trained. False for weights of convolutions alone, whose
            linear layers are random here.
        thresholds: The probability of each class from which on a picture has it, as chosen on the validation
            pictures. Empty unless the model tells several classes of a picture (`identity.multilabel`).
    """

    model: nn.Module
    identity: ModelIdentity
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    digest: str
    run: RunRef | None = None
    data: DataConfig | None = None
    precision: PrecisionName = "auto"
    model_id: str = ""
    resize: str = ""
    has_classifier: bool = True
    thresholds: tuple[float, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle arrays, which the processes of a node share in Ray's object store, and plain values."""
        arrays = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}
        return _from_arrays, ({**vars(self), "model": arrays},)

    @property
    def name(self) -> str:
        """A short name for figures: that of the run, if it is known, else the source."""
        run = re.fullmatch(r"runs:/\w+ \((.+)\)", self.source)
        return run[1] if run else self.source

    def learned_resize(self) -> str:
        """Return how the pictures that the model has learned from were brought to its size."""
        return (
            self.data.resize
            if self.data is not None and self.data.dataset == "images"
            else self.resize or "squash"
        )

    def require_classifier(self) -> None:
        """Check that the model can classify.

        Raises:
            UserError: If the classifier was not trained. The message names the source.
        """
        if not self.has_classifier:
            raise UserError(
                f"{self.source} has no classifier: train one on top of it with python jobs/train.py "
                "transfer, and name that run"
            )


def _from_arrays(values: dict[str, Any]) -> SavedModel:
    with warnings.catch_warnings():
        # Ray's arrays can't be written to, and nobody does: `rebuild` copies them.
        warnings.simplefilter("ignore")
        state = {name: torch.from_numpy(array) for name, array in values["model"].items()}
    return SavedModel(**{**values, "model": rebuild(values["identity"], state, values["source"])})


def rebuild(identity: ModelIdentity, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Build the architecture `identity` with the tensors `state`, in evaluation mode and float32, on the CPU.

    Raises:
        UserError: If there is no such architecture, or names or shapes of the tensors are not those of it.
    """
    shape = models.InputSpec(identity.channels, identity.height, identity.width)
    # Shapes only: the values follow from `state`.
    settings, classes = models.settings_of(identity), len(identity.classes)
    model = models.skeleton(settings, classes, shape, multilabel=identity.multilabel)
    try:
        # Copy each tensor: it may be mapped from a file or belong to another model.
        tensors = {
            name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True)
            for name, tensor in state.items()
        }
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(
            f"{source} does not fit the model {identity}: {' '.join(lines)[:200] or error}"
        ) from error
    return model.requires_grad_(False).eval()
