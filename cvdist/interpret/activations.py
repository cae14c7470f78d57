"""What a network makes of pictures: feature maps, and channels that stay silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import Stage, evaluating, watch_activations
from cvdist.interpret.layers import ConvLayer


@dataclass(frozen=True)
class Maps:
    """The maps of one layer for n pictures, float32 on the CPU.

    before: (n, C, h, w), what the convolution returns; after: (n, C, h', w'), what the ReLU that follows
    returns.
    """

    before: Tensor
    after: Tensor


def capture_activations(model: nn.Module, images: Tensor, layers: Sequence[ConvLayer]) -> dict[str, Maps]:
    """Maps of each of `layers`, by its name, in evaluation mode and without gradients.

    images: float (n, C, H, W), normalised, on the model's device.
    """
    kept: dict[tuple[str, Stage], Tensor] = {}

    def keep(layer: ConvLayer, stage: Stage, maps: Tensor) -> None:
        # A copy in any case: a ReLU in place overwrites what the convolution has returned.
        kept[layer.name, stage] = maps.to("cpu", torch.float32, copy=True)

    with torch.inference_mode(), evaluating(model), watch_activations(model, layers, keep):
        model(images)
    return {layer.name: Maps(kept[layer.name, "before"], kept[layer.name, "after"]) for layer in layers}


def dead_channels(peaks: Tensor) -> list[int]:
    """Channels that are zero after ReLU everywhere in all pictures. peaks: (C,), the largest value of each."""
    return (peaks <= 0).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Shown:
    """What a figure shows of the maps of one picture: some channels of a layer, float32 on the CPU.

    channels: int numbers of the c channels shown, in order; before: (c, h, w); after: (c, h', w'); total:
    channels of the layer; silent: how many of them are zero after ReLU everywhere in this picture.
    """

    channels: tuple[int, ...]
    before: Tensor
    after: Tensor
    total: int
    silent: int


def strongest_channels(maps: Maps, picture: int, limit: int) -> Shown:
    """At most `limit` channels of one picture's maps: those of the greatest mean after ReLU."""
    before, after = maps.before[picture], maps.after[picture]
    order = after.flatten(1).mean(1).argsort(descending=True, stable=True)[:limit]
    channels = order.sort().values
    return Shown(
        channels=tuple(channels.tolist()),
        before=before[channels].clone(),
        after=after[channels].clone(),
        total=len(after),
        silent=len(dead_channels(after.flatten(1).amax(1))),
    )
