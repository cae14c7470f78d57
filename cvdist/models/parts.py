"""A model as two parts: a frozen one, that only has to be run, and a trained one.

The frozen part needs no gradients, no optimiser and no averaging over workers, so the training step runs it
apart: `trained(frozen(x))` is `model(x)`. Both parts share their layers with the model, under the model's own
names: the two parts' state dicts together are the model's.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# Pictures that a CPU takes at a time through frozen layers: what lies between two layers then stays in its
# caches for the most part, and 64 photographs need 50 MB for it instead of 400.
_PORTION = 8


class Frozen(nn.Sequential):
    """Layers that stay as they are: without gradients, and in evaluation mode whatever `train()` says."""

    def __init__(self, layers: OrderedDict[str, nn.Module]) -> None:
        """Freeze `layers` in place."""
        super().__init__(layers)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode: batch norms neither use nor gather the batch's statistics."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Float (n, ...) to float (n, ...), in portions on a CPU."""
        run = super().forward
        if images.device.type != "cpu" or len(images) <= _PORTION or torch.compiler.is_compiling():
            features: Tensor = run(images)
            return features
        return torch.cat([run(portion) for portion in images.split(_PORTION)])


@dataclass(frozen=True)
class Parts:
    """What `split` returns.

    frozen: to be run under `torch.no_grad()`, or None; trained: the rest, the model itself if nothing is
    frozen; backbone: those layers of `trained` that go on from pretrained weights, at a learning rate of their
    own (`--backbone-lr-scale`), or None.
    """

    frozen: nn.Module | None
    trained: nn.Module
    backbone: nn.Module | None = None


@dataclass(frozen=True)
class FrozenPart:
    """The frozen layers of a model by themselves. cut: the name of the last one; source: of their weights."""

    module: Frozen
    cut: str
    source: str

    def feature_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of what they make of one picture."""
        skeleton = copy.deepcopy(self.module).to("meta")
        return tuple(skeleton(torch.zeros(1, channels, height, width, device="meta")).shape[1:])


@runtime_checkable
class Splittable(Protocol):
    """A model that knows which part of it is frozen."""

    def parts(self) -> Parts:
        """The parts, sharing the model's layers."""
        ...


def split(model: nn.Module) -> Parts:
    """The parts of `model`; one that has no notion of them is trained whole."""
    return model.parts() if isinstance(model, Splittable) else Parts(frozen=None, trained=model)


def with_trained(model: nn.Module, trained: nn.Module) -> nn.Module:
    """A second model with `trained`, e.g. an average over steps, in the place of `model`'s trained part.

    It owns no tensors: the frozen ones are those of `model`, the others those of `trained`, and it follows
    them when they are changed in place.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    # Not strict: the frozen names are not among them.
    unknown = twin.load_state_dict(trained.state_dict(), strict=False, assign=True).unexpected_keys
    if unknown:
        raise ValueError(f"not a trained part of this model: it has no {unknown[0]}")
    return twin
