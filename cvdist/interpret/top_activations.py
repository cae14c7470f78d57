"""Which pictures excite a channel most, and where: one pass over any number of pictures, in bounded memory.

After Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", arXiv:1311.2901, which
shows the patches behind the nine strongest activations of a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import Hook, Stage, evaluating, forward_hooks, watch_activations
from cvdist.interpret.layers import ConvLayer, ReceptiveField


@dataclass(frozen=True)
class TopActivations:
    """The pictures that excite each channel of a layer most, strongest first, on the CPU.

    values: float32 (C, k), the largest value after ReLU in the channel's map of each picture; pictures: int64
    (C, k), their rows; places: int64 (C, k, 2), row and column of that value in the map; field: what part of
    the picture a value depends on. Of equal values the picture with the lower row comes first, and of equal
    values in one map the upper left one counts. With fewer than k pictures there are as many columns as
    pictures.
    """

    values: Tensor
    pictures: Tensor
    places: Tensor
    field: Field


class TopActivationCollector:
    """Gathers `TopActivations` from batch to batch. Keeps C x k numbers a layer, however many pictures pass."""

    def __init__(self, model: nn.Module, layers: Sequence[ConvLayer], count: int) -> None:
        """`count`: how many pictures of each channel are kept."""
        self._model, self._layers, self._count = model, layers, count
        self._best: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._fields: dict[str, Field] = {}

    def see(self, images: Tensor, rows: Tensor) -> Tensor:
        """Run a batch through the model and return its scores (n, classes).

        images: float (n, C, H, W), normalised, on the model's device; rows: int64 (n,), what `TopActivations` calls
        them.
        """
        rows = rows.to(images.device)

        def receive(layer: ConvLayer, stage: Stage, maps: Tensor) -> None:
            if stage == "after":
                self._merge(layer.name, maps.float(), rows)

        with torch.inference_mode(), evaluating(self._model):
            if not self._fields:
                self._fields = fields(self._model, images[:1], self._layers)
            with watch_activations(self._model, self._layers, receive):
                scores: Tensor = self._model(images)
        return scores

    def results(self) -> dict[str, TopActivations]:
        """By the layers' names."""
        found = {}
        for name, (values, pictures, places) in self._best.items():
            found[name] = TopActivations(values.cpu(), pictures.cpu(), places.cpu(), self._fields[name])
        return found

    def _merge(self, name: str, maps: Tensor, rows: Tensor) -> None:
        flat = maps.flatten(2).transpose(0, 1)  # (C, n, h w)
        peaks, where = flat.max(-1)  # (C, n); of equal values the first
        places = torch.stack([where // maps.shape[-1], where % maps.shape[-1]], -1)
        pictures = rows.expand(len(peaks), -1)
        if name in self._best:
            old = self._best[name]
            peaks, pictures = torch.cat([old[0], peaks], 1), torch.cat([old[1], pictures], 1)
            places = torch.cat([old[2], places], 1)
        order = pictures.argsort(dim=1, stable=True)
        strongest = peaks.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, : self._count]
        order = order.gather(1, strongest)
        self._best[name] = (
            peaks.gather(1, order),
            pictures.gather(1, order),
            places.gather(1, order[..., None].expand(-1, -1, 2)),
        )


def find_top_activations(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], layers: Sequence[ConvLayer], count: int = 9
) -> dict[str, TopActivations]:
    """The `count` pictures that excite each channel of `layers` most. batches: see `TopActivationCollector.see`."""
    top = TopActivationCollector(model, layers, count)
    for images, rows in batches:
        top.see(images, rows)
    return top.results()


def fields(model: nn.Module, image: Tensor, layers: Sequence[ConvLayer]) -> dict[str, Field]:
    """The receptive field of each layer's map after ReLU, by its name, from one forward pass.

    image: float (1, C, H, W). Exact where layers run one after another; where they branch, the field is that of
    all layers that ran before, so it is rather too large.
    """
    now = Field()
    found: dict[str, Field] = {}

    def pass_through(module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal now
        now = now.through(module)

    def note(layer: ConvLayer, _stage: Stage, _maps: Tensor) -> None:
        # Twice: the second time behind what lies between the convolution and its ReLU, such as a pooling.
        found[layer.name] = now

    spatial: list[tuple[nn.Module, Hook]] = [
        (module, pass_through)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    ]
    with (
        torch.inference_mode(),
        evaluating(model),
        forward_hooks(spatial),
        watch_activations(model, layers, note),
    ):
        model(image)
    return found
