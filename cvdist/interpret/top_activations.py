"""The pictures that activate each channel most, found in one pass over all pictures in bounded memory.

After Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", arXiv:1311.2901, who show
the picture patches of the nine strongest activations of a channel.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cvdist.interpret.hooks import Hook, evaluation_mode, forward_hooks, watch_activations
from cvdist.interpret.layers import ConvLayer, ReceptiveField


@dataclass(frozen=True)
class TopActivations:
    """The k pictures that activate each of the C channels of a layer most, strongest first, on the CPU.

    Among equal values, the picture with the lower row comes first. If fewer than k pictures were seen, k is
    their number.

    Attributes:
        values: Largest value after the activation in the channel's map of each picture, float32 (C, k).
        pictures: Rows of the pictures in the data set, int64 (C, k).
        places: Row and column of that value in the map, int64 (C, k, 2). Among equal values, the upper left
            one.
        field: Receptive field of a value of the map.
        activation: Name of the activation; empty if none follows the layer.
    """

    values: Tensor
    pictures: Tensor
    places: Tensor
    field: ReceptiveField
    activation: str = "ReLU"


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
        self._activations: dict[str, str] = {}

    def update(self, images: Tensor, rows: Tensor) -> Tensor:
        """Run a batch through the model and add its activations.

        Args:
            images: Normalized pictures, float (n, C, H, W), on the model's device.
            rows: Rows of the pictures in the data set, int64 (n,).

        Returns:
            The scores of the model, (n, classes).
        """
        rows = rows.to(images.device)

        def receive(layer: ConvLayer, activation: str | None, maps: Tensor) -> None:
            if activation is not None:
                self._activations[layer.name] = activation
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
            field, activation = self._fields[name], self._activations[name]
            found[name] = TopActivations(values.cpu(), pictures.cpu(), places.cpu(), field, activation)
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


def receptive_fields(model: nn.Module, image: Tensor, layers: Sequence[ConvLayer]) -> dict[str, ReceptiveField]:
    """Compute the receptive field of each layer's map after its activation, from one forward pass.

    Where branches meet, the field covers those of all branches.

    Args:
        model: The model.
        image: One normalized picture, float (1, C, H, W).
        layers: The layers.

    Returns:
        The receptive fields, by the name of the layer.
    """
    fields = _Fields()
    found: dict[str, ReceptiveField] = {}

    def pass_through(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        fields.set(output, fields.of(inputs).after(module))

    def note(layer: ConvLayer, _activation: str | None, maps: Tensor) -> None:
        # Called before and after the activation: the second call knows of layers in between, such as pooling.
        found[layer.name] = fields.of([maps])

    spatial: list[tuple[nn.Module, Hook]] = [
        (module, pass_through)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    ]
    with (
        torch.inference_mode(),
        evaluation_mode(model),
        forward_hooks(spatial),
        fields,
        watch_activations(model, layers, note),
    ):
        model(image)
    return found


class _Fields(TorchFunctionMode):
    """Knows the receptive field of each tensor of a forward pass: that of what it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, ReceptiveField]] = {}

    def set(self, tensor: Tensor, field: ReceptiveField) -> None:
        self._known[id(tensor)] = (tensor, field)  # the tensor is kept, so that its identity stays unique

    def of(self, inputs: Iterable[object]) -> ReceptiveField:
        fields = [self._known[id(one)][1] for one in inputs if id(one) in self._known]
        return functools.reduce(operator.or_, fields, fields[0]) if fields else ReceptiveField()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _flat(args), [one for one in _flat([result]) if isinstance(one, Tensor)]
        if any(id(one) in self._known for one in inputs):
            for one in outputs:
                self.set(one, self.of(inputs))
        return result


def _flat(values: Iterable[Any]) -> list[Any]:
    """Return the values, with tuples and lists, such as those of `cat` and `chunk`, replaced by their items."""
    return [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])]
