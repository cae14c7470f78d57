"""What is known of a trained model once it is open."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cvdist import models
from cvdist.config import DataConfig, Head, ModelConfig, PrecisionName
from cvdist.errors import UserError
from cvdist.models.registry import BLOCKS, find
from cvdist.results import ModelIdentity
from cvdist.tracking import RunRef


@dataclass(frozen=True)
class SavedModel:
    """A trained classifier.

    model: the architecture of the registry under its own layers' names, in evaluation mode, on the CPU,
        float32; takes normalised pictures (n, C, H, W), returns (log-)scores (n, classes).
    mean, std: by channel, for pixels in [0, 1].
    source: where it came from, for people.
    digest: SHA-256 of its tensors, see `cvdist.features.fingerprint.digest`.
    run: the MLflow run that trained it, where one is known; data: what that run learned from.
    precision: that the run computed with, `auto` where that is not known.
    model_id: MLflow's, of a logged model, else empty.
    has_classifier: False for weights of convolutions alone, whose linear layers are random here.
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
    has_classifier: bool = True

    @property
    def name(self) -> str:
        """A short one, for figures: of the run, where that is known."""
        run = re.fullmatch(r"runs:/\w+ \((.+)\)", self.source)
        return run[1] if run else self.source

    def require_classifier(self) -> None:
        """Refuse weights that can't classify.

        Raises:
            UserError: naming the source.
        """
        if not self.has_classifier:
            raise UserError(
                f"{self.source} has convolutions only, and no classifier to ask: train one on top of it with "
                "python jobs/train.py dogs-cats-vgg16, and name that run"
            )


def rebuild(identity: ModelIdentity, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The architecture `identity` with the tensors `state`, in evaluation mode and float32.

    Raises:
        UserError: if there is no such architecture, or the tensors are not exactly its.
    """
    spec = find(identity.name)
    # All blocks trained: the one configuration of a pretrained model that needs no weights to begin with.
    settings = ModelConfig(name=identity.name, trainable_blocks=BLOCKS if spec.pretrained else 0)
    if identity.head:
        head = cast(Head, identity.head)
        settings = dataclasses.replace(settings, head=head, hidden_size=identity.hidden_size)
    shape = models.InputSpec(identity.channels, identity.height, identity.width)
    with torch.device("meta"):  # shapes without values, which are about to come
        model = models.build_model(settings, shape, len(identity.classes))
    try:
        # A copy of each: what was loaded may be mapped from a file, or belong to somebody else.
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
