"""Feature maps of pictures, before and after ReLU, and the channels that are zero for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import Stage, evaluation_mode, watch_activations
from cvdist.interpret.layers import ConvLayer


@dataclass(frozen=True)
class LayerActivations:
    """The feature maps of one layer for n pictures, float32 on the CPU.

    Attributes:
        before: Output of the convolution, (n, C, h, w).
        after: Output of the ReLU that follows it, (n, C, h', w').
    """

    before: Tensor
    after: Tensor


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
    kept: dict[tuple[str, Stage], Tensor] = {}

    def keep(layer: ConvLayer, stage: Stage, maps: Tensor) -> None:
        # Always copy: an in-place ReLU overwrites the convolution's output.
        kept[layer.name, stage] = maps.to("cpu", torch.float32, copy=True)

    with torch.inference_mode(), evaluation_mode(model), watch_activations(model, layers, keep):
        model(images)
    return {
        layer.name: LayerActivations(kept[layer.name, "before"], kept[layer.name, "after"]) for layer in layers
    }


def dead_channels(peaks: Tensor) -> list[int]:
    """Return the channels that are zero after ReLU in all pictures.

    `peaks` (C,) are the largest values of each.
    """
    return (peaks <= 0).nonzero().flatten().tolist()


@dataclass(frozen=True)
class StrongestChannels:
    """The feature maps of one picture in the strongest channels of a layer, float32 on the CPU.

    Attributes:
        channels: Numbers of the c channels, in ascending order.
        before: Their maps before ReLU, (c, h, w).
        after: Their maps after ReLU, (c, h', w').
        total: Number of channels of the layer.
        silent: How many channels of the layer are zero after ReLU everywhere in this picture.
    """

    channels: tuple[int, ...]
    before: Tensor
    after: Tensor
    total: int
    silent: int


def strongest_channels(maps: LayerActivations, picture: int, limit: int) -> StrongestChannels:
    """Select the at most `limit` channels with the greatest mean after ReLU from the maps of one picture."""
    before, after = maps.before[picture], maps.after[picture]
    order = after.flatten(1).mean(1).argsort(descending=True, stable=True)[:limit]
    channels = order.sort().values
    return StrongestChannels(
        channels=tuple(channels.tolist()),
        before=before[channels].clone(),
        after=after[channels].clone(),
        total=len(after),
        silent=len(dead_channels(after.flatten(1).amax(1))),
    )
