"""All that is shown of a model and pictures: one bounded pass, and a closer look at a few of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cvdist.interpret.activations import StrongestChannels, capture_activations, dead_channels, strongest_channels
from cvdist.interpret.gradcam import grad_cam
from cvdist.interpret.layers import ConvLayer, convolutions
from cvdist.interpret.top_activations import TopActivations, TopActivationCollector
from cvdist.seeding import generator

# Values of a picture's pixels that pass through the network at a time: 8 photographs, or 512 digits.
_PORTION_VALUES = 8 * 3 * 224 * 224
_MOST_IN_PORTION = 512


class Source(Protocol):
    """Pictures by row. size: how many; available: how many they were chosen from."""

    size: int
    available: int

    def read(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """uint8 (n, C, H, W) on the CPU, and the names of their classes, empty where unknown."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much is looked at.

    pictures: run through the network; top_activations: kept of each channel; maps: pictures whose maps are shown;
    channels: shown of a layer's maps; explained: pictures with a Grad-CAM, of each kind.
    """

    pictures: int = 128
    top_activations: int = 9
    maps: int = 1
    channels: int = 64
    explained: int = 6


@dataclass(frozen=True)
class Prediction:
    """A picture's row, its class (empty: unknown), the class that the model takes it for, and how surely."""

    row: int
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class ExplainedPrediction:
    """A judged picture with its Grad-CAM for the predicted class and, where that is wrong, for the true one.

    Each float32 (h, w), from 0 on.
    """

    judged: Prediction
    predicted: Tensor
    true: Tensor | None


@dataclass(frozen=True)
class Interpretation:
    """What has been found. seen: how many pictures of `available` have been run through the network.

    top_activations, dead: by the layers' names; dead: channels that were zero after ReLU in all of them. maps: for
    each picture shown, the layers' maps by name. right, wrong: pictures whose classes are known; unknown:
    others; num_correct, num_wrong: how many there are; explained: whether the predictions mean something.
    """

    layers: list[ConvLayer]
    seen: int
    available: int
    top_activations: dict[str, TopActivations]
    dead: dict[str, list[int]]
    maps: list[tuple[Prediction, dict[str, Shown]]]
    cam_layer: str
    right: list[ExplainedPrediction]
    wrong: list[ExplainedPrediction]
    unknown: list[ExplainedPrediction]
    num_correct: int
    num_wrong: int
    explained: bool = True


def interpret_model(
    model: nn.Module,
    source: Source,
    classes: Sequence[str],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    layers: Sequence[ConvLayer],
    limits: Limits,
    *,
    include: Sequence[int] = (),
    counts: tuple[int, int] | None = None,
    explain: bool = True,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Interpretation:
    """Look at `model`, on `device`, with pictures of `source`.

    Args:
        model: takes normalised pictures, returns scores (n, classes).
        source: where pictures come from. Up to `limits.pictures` of them are taken, chosen by a fixed seed.
        classes: names, by the scores' columns.
        normalise: uint8 pixels as float (n, C, H, W) on `device` to what the model takes; may overwrite them.
        device: of the model.
        layers: to look into.
        limits: how much is looked at.
        include: rows that are among them in any case, such as a run's mistakes.
        counts: how many pictures are right and wrong in all, where that is known of more than those looked at.
        explain: whether its predictions mean something; without, there is no Grad-CAM.
        autocast: arithmetic of the pass over all pictures; the closer look is in float32.
        progress: called with the number of pictures done, and of all.
    """
    rows = _chosen(source.size, limits.pictures, include)
    top = TopActivationCollector(model, layers, limits.top_activations)
    judged: list[Prediction] = []
    size = 1
    while len(judged) < len(rows):
        portion = rows[len(judged) : len(judged) + size]
        pixels, true = source.read(portion)
        with autocast():
            scores = top.see(normalise(pixels.to(device).float()), torch.tensor(portion))
        confidence, predicted = (tensor.tolist() for tensor in scores.float().softmax(1).max(1))
        judged += [
            Prediction(row, name, classes[best], sure)
            for row, name, best, sure in zip(portion, true, predicted, confidence, strict=True)
        ]
        progress(len(judged), len(rows))
        size = max(1, min(_MOST_IN_PORTION, _PORTION_VALUES // pixels[0].numel()))
    top_activations = top.results()

    def images(some: Sequence[Prediction]) -> Tensor:
        pixels, _ = source.read([one.row for one in some])
        return normalise(pixels.to(device).float())

    def explained(some: Sequence[Prediction]) -> list[ExplainedPrediction]:
        if not some or not explain:
            return []
        inputs, number = images(some), {name: i for i, name in enumerate(classes)}
        layer = convolutions(model)[-1]
        said = grad_cam(model, layer, inputs, torch.tensor([number[one.predicted] for one in some]))
        known = [i for i, one in enumerate(some) if one.true in number and one.true != one.predicted]
        correct = torch.tensor([number[some[i].true] for i in known])
        meant = grad_cam(model, layer, inputs[known], correct) if known else said[:0]
        by_row = dict(zip(known, meant, strict=True))
        return [ExplainedPrediction(one, said[i], by_row.get(i)) for i, one in enumerate(some)]

    right = [one for one in judged if one.true == one.predicted]
    wrong = sorted((one for one in judged if one.true not in ("", one.predicted)), key=_most_confident)
    unknown = [one for one in judged if not one.true]
    looked_at = (_one_of_each_class(right, limits.maps) or unknown or judged)[: limits.maps]
    maps = []
    for one in looked_at:  # one at a time: a picture's maps are 100 MB in a VGG16
        captured = capture_activations(model, images([one]), layers)
        maps.append((one, {name: strongest_channels(found, 0, limits.channels) for name, found in captured.items()}))
    return Interpretation(
        layers=list(layers),
        seen=len(rows),
        available=source.available,
        top_activations=top_activations,
        dead={name: dead_channels(found.values[:, 0]) for name, found in top_activations.items()},
        maps=maps,
        cam_layer=convolutions(model)[-1].name,
        right=explained(_one_of_each_class(right, limits.explained)),
        wrong=explained(wrong[: limits.explained]),
        unknown=explained(unknown[: limits.explained]),
        num_correct=counts[0] if counts else len(right),
        num_wrong=counts[1] if counts else len(wrong),
        explained=explain,
    )


def _chosen(size: int, limit: int, include: Sequence[int]) -> list[int]:
    """Rows in ascending order, `limit` of them or as many as there are."""
    shuffled = torch.randperm(size, generator=generator("pictures that are looked at")).tolist()
    certain = list(dict.fromkeys(include))[:limit]
    others = [row for row in shuffled if row not in set(certain)]
    return sorted(certain + others[: max(0, limit - len(certain))])


def _one_of_each_class(judged: Sequence[Prediction], count: int) -> list[Prediction]:
    """Up to `count` pictures that take turns by class, in the order of their rows."""
    by_class: dict[str, list[Prediction]] = {}
    for one in judged:
        by_class.setdefault(one.true, []).append(one)
    turns = [(turn, name, one) for name, ones in by_class.items() for turn, one in enumerate(ones[:count])]
    return [one for _, _, one in sorted(turns, key=lambda entry: entry[:2])[:count]]


def _most_confident(judged: Prediction) -> tuple[float, int]:
    return -judged.confidence, judged.row
