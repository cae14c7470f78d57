"""The convolution layers of a model, by name and number, and their receptive fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdist.errors import UserError

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_MOST_NAMED = 40  # layers listed in an error message


@dataclass(frozen=True)
class ConvLayer:
    """A convolution layer of a model.

    Attributes:
        name: Name in the model's state dict, without `.weight`.
        number: Position among the model's convolutions, from 1.
        module: The layer.
    """

    name: str
    number: int
    module: nn.Conv2d

    @property
    def weight(self) -> Tensor:
        """A copy of the weights on the CPU, float32 (outputs, inputs / groups, height, width)."""
        return self.module.weight.detach().to("cpu", torch.float32, copy=True).contiguous()


@dataclass(frozen=True)
class ReceptiveField:
    """The part of the picture that one value of a feature map depends on, in pixels.

    Computed as in Araujo, Norris and Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks".

    Attributes:
        size: Height and width.
        offset: Top and left edge for the first value of the map; negative if it lies in the padding.
        step: Vertical and horizontal distance between the fields of neighboring values.
    """

    size: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Return top, left, bottom and right edge for the value at (`row`, `column`).

        May extend beyond the picture.
        """
        top, left = (
            offset + step * at for offset, step, at in zip(self.offset, self.step, (row, column), strict=True)
        )
        return top, left, top + self.size[0], left + self.size[1]

    def __or__(self, other: ReceptiveField) -> ReceptiveField:
        """Return the smallest field that covers both, of maps that are added or laid beside each other."""
        ends = [
            max(one.offset[i] + one.size[i] for one in (self, other)) - min(self.offset[i], other.offset[i])
            for i in range(2)
        ]
        return ReceptiveField(
            size=(ends[0], ends[1]),
            offset=_two(min(pair) for pair in zip(self.offset, other.offset, strict=True)),
            step=_two(max(pair) for pair in zip(self.step, other.step, strict=True)),
        )

    def after(self, module: nn.Module) -> ReceptiveField:
        """Return the receptive field after one more layer."""
        kernel, stride, padding, dilation = (
            _pair(getattr(module, name, default))
            for name, default in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
        )
        both = range(2)
        return ReceptiveField(
            size=_two(self.size[i] + (kernel[i] - 1) * dilation[i] * self.step[i] for i in both),
            offset=_two(self.offset[i] - padding[i] * self.step[i] for i in both),
            step=_two(self.step[i] * stride[i] for i in both),
        )


def convolutions(model: nn.Module) -> list[ConvLayer]:
    """Return all convolution layers of `model`, in the order of its modules."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [ConvLayer(name, number, module) for number, (name, module) in enumerate(found, start=1)]


def select_layers(model: nn.Module, asked: str = "", flag: str = "--layers") -> list[ConvLayer]:
    """Return the convolution layers that `asked` names, in the model's order.

    Args:
        model: The model.
        asked: Names, numbers (`1` is the first layer), `first` to `tenth`, `last` or `all`, separated by
            commas. Empty: the first, the fifth and the last layer, as far as they exist.
        flag: The flag that `asked` was given with, for error messages.

    Raises:
        UserError: If there is no such layer. The message lists the layers of the model.
    """
    layers = convolutions(model)
    if not layers:
        raise UserError(f"the model {type(model).__name__} has no convolution layers (nn.Conv2d) to look into")
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not words:
        return [layer for layer in layers if layer.number in (1, 5, len(layers))]
    chosen: set[int] = set()
    for word in words:
        chosen |= _numbers(word, layers, flag)
    return [layer for layer in layers if layer.number in chosen]


def _numbers(word: str, layers: Sequence[ConvLayer], flag: str) -> set[int]:
    if word == "all":
        return {layer.number for layer in layers}
    if word == "last":
        return {len(layers)}
    number = _ORDINALS.index(word) + 1 if word in _ORDINALS else int(word) if word.isdecimal() else 0
    found = {layer.number for layer in layers if number == layer.number or word == layer.name}
    if not found:
        names = ", ".join(layer.name for layer in layers[:_MOST_NAMED])
        more = f" and {len(layers) - _MOST_NAMED} more" if len(layers) > _MOST_NAMED else ""
        raise UserError(
            f"{flag} {word}: the model has no such convolution; it has {len(layers)}: {names}{more} (or 1 to "
            f"{len(layers)}, first, last, all)"
        )
    return found


def _pair(value: int | tuple[int, ...] | str) -> tuple[int, int]:
    if isinstance(value, str):  # padding "same" or "valid": the box may be off by the padding
        return 0, 0
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _two(values: Iterator[int]) -> tuple[int, int]:
    first, second = values
    return first, second
