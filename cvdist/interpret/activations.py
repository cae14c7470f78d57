"""Feature maps of pictures, before and after their activation, and the channels that are dead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import evaluation_mode, watch_activations
from cvdist.interpret.layers import ConvLayer


@dataclass(frozen=True)
class LayerActivations:
    """The feature maps of one layer for n pictures, float32 on the CPU.

    Attributes:
        before: Output of the convolution, (n, C, h, w).
        after: Output of the activation that follows it, (n, C, h', w'); `before` if none does.
        activation: Name of the activation; empty if none follows.
    """

    before: Tensor
    after: Tensor
    activation: str


def capture_activations(
    model: nn.Module, images: Tensor, layers: Sequence[ConvLayer]
) -> dict[str, LayerActivations]:
    """Run pictures through a model in evaluation mode and without gradients, and keep the maps of some layers.

    Args:
        model: The model.
        images: Normalized pictures, float (n, C, H, W), on the model's device.
        layers: The layers whose maps are kept.

    Returns:
        The maps of each layer, by the layer's name.
    """
    before: dict[str, Tensor] = {}
    found: dict[str, LayerActivations] = {}

    def keep(layer: ConvLayer, activation: str | None, maps: Tensor) -> None:
        # Always copy: an activation in place overwrites the convolution's output.
        if activation is None:
            before[layer.name] = maps.to("cpu", torch.float32, copy=True)
            return
        first = before[layer.name]
        after = maps.to("cpu", torch.float32, copy=True) if activation else first
        found[layer.name] = LayerActivations(first, after, activation)

    with torch.inference_mode(), evaluation_mode(model), watch_activations(model, layers, keep):
        model(images)
    return found


def can_be_dead(activation: str) -> bool:
    """Return whether an activation is zero, and its gradient too, for all values that are not positive."""
    return activation in ("ReLU", "ReLU6")


def dead_channels(peaks: Tensor) -> list[int]:
    """Return the channels that are zero after their activation in all pictures.

    `peaks` (C,) are the largest values of each.
    """
    return (peaks <= 0).nonzero().flatten().tolist()


@dataclass(frozen=True)
class StrongestChannels:
    """The feature maps of one picture in the strongest channels of a layer, float32 on the CPU.

    Attributes:
        channels: Numbers of the c channels, in ascending order.
        before: Their maps before the activation, (c, h, w).
        after: Their maps after it, (c, h', w').
        total: Number of channels of the layer.
        silent: How many channels of the layer are nowhere above zero in this picture, after the activation.
        activation: Name of the activation; empty if none follows the layer.
    """

    channels: tuple[int, ...]
    before: Tensor
    after: Tensor
    total: int
    silent: int
    activation: str = "ReLU"


def strongest_channels(maps: LayerActivations, picture: int, limit: int) -> StrongestChannels:
    """Select up to `limit` channels of a picture: those with the greatest means after the activation."""
    before, after = maps.before[picture], maps.after[picture]
    order = after.flatten(1).mean(1).argsort(descending=True, stable=True)[:limit]
    channels = order.sort().values
    return StrongestChannels(
        channels=tuple(channels.tolist()),
        before=before[channels].clone(),
        after=after[channels].clone(),
        total=len(after),
        silent=len(dead_channels(after.flatten(1).amax(1))),
        activation=maps.activation,
    )
