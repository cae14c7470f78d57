"""Interpret a model: run a bounded number of pictures through it, and take a closer look at a few of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cvdist.data.labels import NO_CLASS
from cvdist.interpret.activations import (
    StrongestChannels,
    can_be_dead,
    capture_activations,
    dead_channels,
    strongest_channels,
)
from cvdist.interpret.gradcam import grad_cam, last_maps
from cvdist.interpret.layers import ConvLayer
from cvdist.interpret.top_activations import TopActivationCollector, TopActivations
from cvdist.models.servable import probabilities
from cvdist.seeding import generator

logger = logging.getLogger(__name__)

# Largest batch, in values of pixels and in pictures: 8 photographs or 512 digits.
_BATCH_VALUES = 8 * 3 * 224 * 224
_MOST_IN_BATCH = 512


class PictureSource(Protocol):
    """Pictures that can be read by their row.

    Attributes:
        size: How many pictures there are.
        available: How many pictures they were sampled from.
    """

    size: int
    available: int

    def read(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Read n pictures.

        Args:
            rows: Rows of the pictures.

        Returns:
            The pictures, uint8 (n, C, H, W) on the CPU, and the names of their classes, empty if unknown.
        """
        ...


@dataclass(frozen=True)
class Limits:
    """Limits of an interpretation.

    Attributes:
        pictures: How many pictures are run through the network.
        top_activations: How many pictures are kept for each channel.
        maps: For how many pictures the feature maps are kept.
        channels: How many channels of a layer's feature maps are kept.
        grad_cams: How many correct, wrong and unlabeled predictions each get Grad-CAM maps.
    """

    pictures: int = 128
    top_activations: int = 9
    maps: int = 1
    channels: int = 64
    grad_cams: int = 6


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one picture.

    Attributes:
        row: Row of the picture in its source.
        true: Name of the true class, of several labels of the most probable one; empty if unknown.
        predicted: Name of the predicted class.
        confidence: Probability of the predicted class, in [0, 1].
    """

    row: int
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class ExplainedPrediction:
    """A prediction with its Grad-CAM maps, float32 (h, w), 0 or more.

    Attributes:
        prediction: The prediction.
        predicted_map: Map of the predicted class.
        true_map: Map of the true class, if the prediction is wrong.
    """

    prediction: Prediction
    predicted_map: Tensor
    true_map: Tensor | None


@dataclass(frozen=True)
class Interpretation:
    """The result of interpreting a model.

    Attributes:
        layers: The layers that were looked at.
        seen: How many pictures were run through the network.
        available: How many pictures they were sampled from.
        top_activations: The pictures that activate each channel most, by the name of the layer.
        dead: Channels that were zero after ReLU in all pictures, by the name of the layer; only of layers that
            ReLU or ReLU6 follows.
        maps: A few predictions with the feature maps of their pictures, by the name of the layer.
        cam_layer: Name of the layer that the Grad-CAM maps are of; empty without any.
        correct: Correct predictions, one picture of each class in turn.
        wrong: Wrong predictions, the most confident ones first.
        unlabeled: Predictions for pictures whose true class is unknown.
        num_correct: How many predictions are correct in total.
        num_wrong: How many predictions are wrong in total.
        has_classifier: Whether the classifier was trained, so that predictions mean something.
    """

    layers: list[ConvLayer]
    seen: int
    available: int
    top_activations: dict[str, TopActivations]
    dead: dict[str, list[int]]
    maps: list[tuple[Prediction, dict[str, StrongestChannels]]]
    cam_layer: str
    correct: list[ExplainedPrediction]
    wrong: list[ExplainedPrediction]
    unlabeled: list[ExplainedPrediction]
    num_correct: int
    num_wrong: int
    has_classifier: bool = True


def interpret_model(
    model: nn.Module,
    source: PictureSource,
    classes: Sequence[str],
    normalize: Callable[[Tensor], Tensor],
    device: torch.device,
    layers: Sequence[ConvLayer],
    limits: Limits,
    *,
    include: Sequence[int] = (),
    counts: tuple[int, int] | None = None,
    has_classifier: bool = True,
    multilabel: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Interpretation:
    """Find out what `model` has learned, from a sample of the pictures of `source`.

    Args:
        model: Takes normalized pictures and returns scores (n, classes).
        source: The pictures. Up to `limits.pictures` of them are sampled with a fixed seed.
        classes: Class names, in the order of the scores' columns.
        normalize: Normalizes pixel values in [0, 255], float (n, C, H, W) on `device`, as the model takes them.
            May overwrite its argument.
        device: Device of the model.
        layers: The layers to look at.
        limits: How many pictures, maps and channels are looked at and kept.
        include: Rows that the sample has to include, such as a run's mistakes.
        counts: Numbers of correct and wrong predictions, if they are known for more pictures than the sample.
        has_classifier: Whether the classifier was trained. If not, there is no Grad-CAM.
        multilabel: Whether a picture may have several classes. Its prediction, the most probable class, is then
            right if it is one of them; pictures of no class are neither right nor wrong.
        autocast: Context for the pass over all pictures, which sets its precision. Feature maps and Grad-CAM
            maps are computed in float32.
        progress: Called with the number of pictures done and their total number.

    Returns:
        What was found out.
    """
    rows = _chosen(source.size, limits.pictures, include)
    top = TopActivationCollector(model, layers, limits.top_activations)
    predictions: list[Prediction] = []
    size = 1
    while len(predictions) < len(rows):
        batch = rows[len(predictions) : len(predictions) + size]
        pixels, true = source.read(batch)
        with autocast():
            scores = top.update(normalize(pixels.to(device).float()), torch.tensor(batch))
        chances = probabilities(scores.float(), multilabel=multilabel)
        if multilabel:
            true = [
                _most_probable(names, classes, row) for names, row in zip(true, chances.tolist(), strict=True)
            ]
        confidence, predicted = (tensor.tolist() for tensor in chances.max(1))
        predictions += [
            Prediction(row, name, classes[best], probability)
            for row, name, best, probability in zip(batch, true, predicted, confidence, strict=True)
        ]
        progress(len(predictions), len(rows))
        size = max(1, min(_MOST_IN_BATCH, _BATCH_VALUES // pixels[0].numel()))
    top_activations = top.results()

    def images(chosen: Sequence[Prediction]) -> Tensor:
        pixels, _ = source.read([one.row for one in chosen])
        return normalize(pixels.to(device).float())

    layer = last_maps(model, images(predictions[:1])) if has_classifier and predictions else None
    if has_classifier and layer is None:
        logger.info("figures    without Grad-CAM: the answer rests on no maps of more than one place")

    def explained(chosen: Sequence[Prediction]) -> list[ExplainedPrediction]:
        if not chosen or layer is None:
            return []
        inputs, number = images(chosen), {name: i for i, name in enumerate(classes)}
        predicted_maps = grad_cam(model, layer, inputs, torch.tensor([number[one.predicted] for one in chosen]))
        known = [i for i, one in enumerate(chosen) if one.true in number and one.true != one.predicted]
        true_classes = torch.tensor([number[chosen[i].true] for i in known])
        true_maps = grad_cam(model, layer, inputs[known], true_classes) if known else predicted_maps[:0]
        by_row = dict(zip(known, true_maps, strict=True))
        return [ExplainedPrediction(one, predicted_maps[i], by_row.get(i)) for i, one in enumerate(chosen)]

    correct = [one for one in predictions if one.true == one.predicted]
    others = (one for one in predictions if one.true not in ("", NO_CLASS, one.predicted))
    wrong = sorted(others, key=lambda one: (-one.confidence, one.row))
    unlabeled = [one for one in predictions if not one.true]
    looked_at = (_one_of_each_class(correct, limits.maps) or unlabeled or predictions)[: limits.maps]
    maps = []
    for one in looked_at:  # one at a time: the maps of a picture take 100 MB in a VGG16
        captured = capture_activations(model, images([one]), layers)
        maps.append(
            (one, {name: strongest_channels(found, 0, limits.channels) for name, found in captured.items()})
        )
    return Interpretation(
        layers=list(layers),
        seen=len(rows),
        available=source.available,
        top_activations=top_activations,
        dead={
            name: dead_channels(found.values[:, 0])
            for name, found in top_activations.items()
            if can_be_dead(found.activation)
        },
        maps=maps,
        cam_layer=layer.name if layer else "",
        correct=explained(_one_of_each_class(correct, limits.grad_cams)),
        wrong=explained(wrong[: limits.grad_cams]),
        unlabeled=explained(unlabeled[: limits.grad_cams]),
        num_correct=counts[0] if counts else len(correct),
        num_wrong=counts[1] if counts else len(wrong),
        has_classifier=has_classifier,
    )


def _chosen(size: int, limit: int, include: Sequence[int]) -> list[int]:
    """Sample up to `limit` of `size` rows, with `include` among them. Returns them in ascending order."""
    shuffled = torch.randperm(size, generator=generator("pictures that are looked at")).tolist()
    certain = list(dict.fromkeys(include))[:limit]
    others = [row for row in shuffled if row not in set(certain)]
    return sorted(certain + others[: max(0, limit - len(certain))])


def _most_probable(names: str, classes: Sequence[str], chances: Sequence[float]) -> str:
    """Return the most probable of a picture's classes, whose names are joined (`cvdist.data.labels`)."""
    mine = [i for i, name in enumerate(classes) if f", {name}," in f", {names},"]
    return classes[max(mine, key=chances.__getitem__)] if mine else names


def _one_of_each_class(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return up to `count` predictions, taking one of each true class in turn, in the order of their rows."""
    by_class: dict[str, list[Prediction]] = {}
    for one in predictions:
        by_class.setdefault(one.true, []).append(one)
    turns = [(turn, name, one) for name, ones in by_class.items() for turn, one in enumerate(ones[:count])]
    return [one for _, _, one in sorted(turns, key=lambda entry: entry[:2])[:count]]
