"""A model divided into its frozen modules, which are only run, and its trained modules.

Frozen modules need no gradients, no optimizer and no averaging over workers, so the training step runs them
separately: `trained(frozen(x))` equals `model(x)`. Both share their layers with the model, under the model's
own names, so their state dicts together are the model's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from cvdist.models.cutting import Frozen, Layers


@dataclass(frozen=True)
class FrozenAndTrained:
    """The frozen and the trained modules of a model.

    Attributes:
        frozen: Modules to be run under `torch.no_grad()`. None if nothing is frozen.
        trained: All other modules. It is the model itself if nothing is frozen.
        backbone: The layers of `trained` in front of the head. They start from pretrained weights and have a
            learning rate of their own (`--backbone-lr-scale`). None if they have no weights.
        head: Name of the head in `trained`, the module that reads what the pretrained network computes. Empty
            for models without one.
        stages: The stages of the backbone, which follow each other. Empty if there is no backbone.
        rest: What follows the backbone, the head among it. None if there is no backbone.
    """

    frozen: nn.Module | None
    trained: nn.Module
    backbone: nn.Module | None = None
    head: str = ""
    stages: tuple[Layers, ...] = ()
    rest: Layers | None = None

    def recompute_stages(self) -> None:
        """Let the backward pass of a training step compute each stage again, from its input."""
        assert self.rest is not None and isinstance(self.trained, Layers) and isinstance(self.backbone, Layers)
        self.trained.recompute(*self.stages, then=self.rest)
        self.backbone.recompute(*self.stages)


@dataclass(frozen=True)
class FrozenBackbone:
    """The frozen layers of a pretrained model, without the rest of it.

    Attributes:
        module: The layers, with their weights.
        cut: Name of the last frozen layer or operation.
        source: Where the weights come from.
    """

    module: Frozen
    cut: str
    source: str

    def feature_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the features of one picture of this shape."""
        skeleton = copy.deepcopy(self.module).to("meta")
        return tuple(skeleton(torch.zeros(1, channels, height, width, device="meta")).shape[1:])


@runtime_checkable
class HasFrozenLayers(Protocol):
    """A model that knows which of its layers are frozen."""

    def frozen_and_trained(self) -> FrozenAndTrained:
        """Return the frozen and the trained modules, which share the model's layers."""
        ...


def frozen_and_trained(model: nn.Module) -> FrozenAndTrained:
    """Divide `model` into frozen and trained modules. A model that freezes nothing is trained as a whole."""
    if isinstance(model, HasFrozenLayers):
        return model.frozen_and_trained()
    return FrozenAndTrained(frozen=None, trained=model)


def with_trained(model: nn.Module, trained: nn.Module) -> nn.Module:
    """Return a second model with `trained`, such as a moving average, in place of `model`'s trained modules.

    It owns no tensors. The frozen ones are those of `model` and the others those of `trained`, so it changes
    when they are changed in place.

    Raises:
        ValueError: If `trained` has a tensor that `model` does not have.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    # Not strict, because `trained` has none of the frozen tensors.
    unknown = twin.load_state_dict(trained.state_dict(), strict=False, assign=True).unexpected_keys
    if unknown:
        raise ValueError(f"these are not trained modules of this model: it has no {unknown[0]}")
    return twin
