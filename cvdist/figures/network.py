"""The figures that show what a network has learned, by their paths below the run's `figures/` folder.

matplotlib is imported when a figure is drawn, so that a process that only names figures does not load it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from cvdist.interpret.interpretation import Interpretation, PictureSource, Prediction
from cvdist.interpret.layers import ConvLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawings = dict[str, Callable[[], "Figure"]]
"""Functions that draw a figure, by the figure's path below `figures/`, without suffix."""


def filter_figure(
    layer: str, weight: Tensor, channels: Literal["strongest", "mean"] = "strongest", when: str = ""
) -> Figure:
    """Draw the filters of a layer (`cvdist.figures.filters.filter_grid`)."""
    from cvdist.figures.filters import filter_grid

    return filter_grid(weight, layer, channels=channels, when=when)


def filters_svg(layer: str, weight: Tensor, when: str = "") -> bytes:
    """Draw the filters of a layer, and return the content of an SVG file."""
    import io

    from cvdist.figures.style import save_svg

    file = io.BytesIO()
    save_svg(filter_figure(layer, weight, when=when), file)
    return file.getvalue()


def small_enough_for_svg(layer: ConvLayer) -> bool:
    """Return whether an SVG of the filters is small: at most 64 filters of 49 pixels on 1 or 3 channels."""
    shape = layer.module.weight.shape
    return shape[1] in (1, 3) and shape[0] <= 64 and shape[2:].numel() <= 49


def before_and_after(layer: str, before: Tensor, after: Tensor, when: str) -> Figure:
    """Draw the filters that training changed most (`cvdist.figures.filters.before_and_after`)."""
    from cvdist.figures import filters

    return filters.before_and_after(before, after, layer, when=when)


def animate_filters(layer: str, frames: list[tuple[int, Tensor]]) -> bytes:
    """Draw a layer's filters over the epochs as a GIF (`cvdist.figures.animation.animate_filters`)."""
    from cvdist.figures import animation

    return animation.animate_filters(frames, layer)


def interpretation_figures(interpretation: Interpretation, source: PictureSource) -> Drawings:
    """Return the figures of an interpretation: activations, top activations and Grad-CAM.

    Args:
        interpretation: What was found out about the model.
        source: Where each figure reads its pictures when it is drawn.
    """
    drawings: Drawings = {}
    for number, (prediction, _) in enumerate(interpretation.maps):
        for layer in interpretation.layers:
            name = f"activations/{layer.name}" + (f"-picture-{number + 1}" if number else "")
            drawings[name] = functools.partial(_activations, interpretation, source, number, prediction, layer)
    for layer in interpretation.layers:
        if layer.name in interpretation.top_activations:
            weight = layer.weight
            drawings[f"top_activations/{layer.name}"] = functools.partial(
                _top_activations, interpretation, source, layer.name, weight
            )
    if interpretation.correct:
        drawings["gradcam/right"] = functools.partial(_right, interpretation, source)
    if interpretation.correct or interpretation.wrong:
        drawings["gradcam/wrong"] = functools.partial(_wrong, interpretation, source)
    if interpretation.unlabeled:
        drawings["gradcam/predicted"] = functools.partial(_predicted, interpretation, source)
    return drawings


def _activations(
    interpretation: Interpretation, source: PictureSource, number: int, prediction: Prediction, layer: ConvLayer
) -> Figure:
    from cvdist.figures.activations import feature_maps

    images, _ = source.read([prediction.row])
    return feature_maps(
        interpretation.maps[number][1][layer.name],
        images[0],
        layer.name,
        label=_label(interpretation, prediction),
        dead=interpretation.dead[layer.name],
        seen=interpretation.seen,
    )


def _label(interpretation: Interpretation, prediction: Prediction) -> str:
    """Describe a picture by its true class and, where the model has a trained classifier, by its prediction."""
    from cvdist.figures.style import confidence

    true = f"class {prediction.true}" if prediction.true else "class unknown"
    predicted = f"predicted {prediction.predicted}, {confidence(prediction.confidence)}"
    return f"{true}; {predicted}" if interpretation.has_classifier else true


def _top_activations(
    interpretation: Interpretation, source: PictureSource, name: str, weight: Tensor
) -> Figure:
    from cvdist.figures.top_activations import shown_channels, top_activation_patches

    found = interpretation.top_activations[name]
    rows = sorted({int(row) for channel in shown_channels(found) for row in found.pictures[channel]})
    images, labels = source.read(rows)
    return top_activation_patches(
        found,
        dict(zip(rows, images, strict=True)),
        dict(zip(rows, labels, strict=True)),
        weight,
        name,
        seen=interpretation.seen,
        available=interpretation.available,
        dead=len(interpretation.dead[name]),
    )


def _right(interpretation: Interpretation, source: PictureSource) -> Figure:
    from cvdist.figures.gradcam import correct_predictions

    images, _ = source.read([one.prediction.row for one in interpretation.correct])
    total = interpretation.num_correct + interpretation.num_wrong
    return correct_predictions(
        interpretation.correct, images, interpretation.cam_layer, right=interpretation.num_correct, seen=total
    )


def _wrong(interpretation: Interpretation, source: PictureSource) -> Figure:
    from cvdist.figures.gradcam import wrong_predictions

    images, _ = source.read([one.prediction.row for one in interpretation.wrong])
    total = interpretation.num_correct + interpretation.num_wrong
    return wrong_predictions(
        interpretation.wrong, images, interpretation.cam_layer, wrong=interpretation.num_wrong, seen=total
    )


def _predicted(interpretation: Interpretation, source: PictureSource) -> Figure:
    from cvdist.figures.gradcam import unlabeled_predictions

    images, _ = source.read([one.prediction.row for one in interpretation.unlabeled])
    return unlabeled_predictions(
        interpretation.unlabeled, images, interpretation.cam_layer, seen=interpretation.seen
    )
