"""The pictures that activate each channel most, found in one pass over all pictures in bounded memory.

After Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", arXiv:1311.2901, who show
the picture patches of the nine strongest activations of a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdist.interpret.hooks import Hook, Stage, evaluation_mode, forward_hooks, watch_activations
from cvdist.interpret.layers import ConvLayer, ReceptiveField


@dataclass(frozen=True)
class TopActivations:
    """The k pictures that activate each of the C channels of a layer most, strongest first, on the CPU.

    Among equal values, the picture with the lower row comes first. If fewer than k pictures were seen, k is
    their number.

    Attributes:
        values: Largest value after ReLU in the channel's map of each picture, float32 (C, k).
        pictures: Rows of the pictures in the data set, int64 (C, k).
        places: Row and column of that value in the map, int64 (C, k, 2). Among equal values, the upper left
            one.
        field: Receptive field of a value of the map.
    """

    values: Tensor
    pictures: Tensor
    places: Tensor
    field: ReceptiveField


class TopActivationCollector:
    """Collects `TopActivations` over batches.

    Keeps C x k numbers per layer, however many pictures there are.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ConvLayer], count: int) -> None:
        """Prepare for `layers` of `model`.

        Args:
            model: The model.
            layers: The layers whose activations are collected.
            count: How many pictures are kept for each channel.
        """
        self._model, self._layers, self._count = model, layers, count
        self._best: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._fields: dict[str, ReceptiveField] = {}

    def update(self, images: Tensor, rows: Tensor) -> Tensor:
        """Run a batch through the model and add its activations.

        Args:
            images: Normalized pictures, float (n, C, H, W), on the model's device.
            rows: Rows of the pictures in the data set, int64 (n,).

        Returns:
            The scores of the model, (n, classes).
        """
        rows = rows.to(images.device)

        def receive(layer: ConvLayer, stage: Stage, maps: Tensor) -> None:
            if stage == "after":
                self._merge(layer.name, maps.float(), rows)

        with torch.inference_mode(), evaluation_mode(self._model):
            if not self._fields:
                self._fields = receptive_fields(self._model, images[:1], self._layers)
            with watch_activations(self._model, self._layers, receive):
                scores: Tensor = self._model(images)
        return scores

    def results(self) -> dict[str, TopActivations]:
        """Return the top activations of all pictures so far, by the name of the layer."""
        found = {}
        for name, (values, pictures, places) in self._best.items():
            found[name] = TopActivations(values.cpu(), pictures.cpu(), places.cpu(), self._fields[name])
        return found

    def _merge(self, name: str, maps: Tensor, rows: Tensor) -> None:
        flat = maps.flatten(2).transpose(0, 1)  # (C, n, h w)
        peaks, where = flat.max(-1)  # (C, n); among equal values the first
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
    """Find the pictures that activate each channel of `layers` most.

    Args:
        model: The model.
        batches: Pairs of normalized pictures, float (n, C, H, W), and their rows, int64 (n,).
        layers: The layers to look at.
        count: How many pictures are kept for each channel.

    Returns:
        The top activations, by the name of the layer.
    """
    top = TopActivationCollector(model, layers, count)
    for images, rows in batches:
        top.update(images, rows)
    return top.results()


def receptive_fields(model: nn.Module, image: Tensor, layers: Sequence[ConvLayer]) -> dict[str, ReceptiveField]:
    """Compute the receptive field of each layer's map after ReLU, from one forward pass.

    The result is exact if layers run one after another. If they branch, the field is that of all layers that
    ran before, and so may be too large.

    Args:
        model: The model.
        image: One normalized picture, float (1, C, H, W).
        layers: The layers.

    Returns:
        The receptive fields, by the name of the layer.
    """
    now = ReceptiveField()
    found: dict[str, ReceptiveField] = {}

    def pass_through(module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal now
        now = now.after(module)

    def note(layer: ConvLayer, _stage: Stage, _maps: Tensor) -> None:
        # Called before and after ReLU: the second call accounts for layers in between, such as pooling.
        found[layer.name] = now

    spatial: list[tuple[nn.Module, Hook]] = [
        (module, pass_through)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    ]
    with (
        torch.inference_mode(),
        evaluation_mode(model),
        forward_hooks(spatial),
        watch_activations(model, layers, note),
    ):
        model(image)
    return found
