"""The figures of what a network has learned, by their names below `figures/`.

What draws is imported when something is drawn, so that naming figures costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from cvdist.interpret.layers import ConvLayer
from cvdist.interpret.interpretation import Prediction, PictureSource, Interpretation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawings = dict[str, Callable[[], "Figure"]]


def filters(
    layer: str, weight: Tensor, channels: Literal["strongest", "mean"] = "strongest", when: str = ""
) -> Figure:
    """See `cvdist.figures.filters.filter_grid`."""
    from cvdist.figures.filters import filter_grid

    return filter_grid(weight, layer, channels=channels, when=when)


def filters_svg(layer: str, weight: Tensor, when: str = "") -> bytes:
    """The same as a file of vectors."""
    import io

    from cvdist.figures.style import save_svg

    file = io.BytesIO()
    save_svg(filters(layer, weight, when=when), file)
    return file.getvalue()


def small_enough_for_svg(layer: ConvLayer) -> bool:
    """Whether its filters are few squares: those of a first layer, on one channel or three."""
    shape = layer.module.weight.shape
    return shape[1] in (1, 3) and shape[0] <= 64 and shape[2:].numel() <= 49


def before_and_after(layer: str, before: Tensor, after: Tensor, when: str) -> Figure:
    """See `cvdist.figures.filters.before_and_after`."""
    from cvdist.figures import filters

    return filters.before_and_after(before, after, layer, when=when)


def forming(layer: str, frames: list[tuple[int, Tensor]]) -> bytes:
    """See `cvdist.figures.animation.forming`."""
    from cvdist.figures import animation

    return animation.forming(frames, layer)


def interpretation_figures(interpretation: Interpretation, source: Source) -> Drawings:
    """Activations, top activations and Grad-CAM; the pictures come from `source` when they are drawn."""
    drawings: Drawings = {}
    for number, (judged, _) in enumerate(interpretation.maps):
        for layer in interpretation.layers:
            name = f"activations/{layer.name}" + (f"-picture-{number + 1}" if number else "")
            drawings[name] = functools.partial(_activations, interpretation, source, number, judged, layer)
    for layer in interpretation.layers:
        if layer.name in interpretation.top_activations:
            weight = layer.weight
            drawings[f"top_activations/{layer.name}"] = functools.partial(_exciting, interpretation, source, layer.name, weight)
    if interpretation.right:
        drawings["gradcam/right"] = functools.partial(_right, interpretation, source)
    if interpretation.right or interpretation.wrong:
        drawings["gradcam/wrong"] = functools.partial(_wrong, interpretation, source)
    if interpretation.unknown:
        drawings["gradcam/predicted"] = functools.partial(_predicted, interpretation, source)
    return drawings


def _activations(interpretation: Interpretation, source: Source, number: int, judged: Prediction, layer: ConvLayer) -> Figure:
    from cvdist.figures.activations import feature_maps

    images, _ = source.read([judged.row])
    return feature_maps(
        interpretation.maps[number][1][layer.name],
        images[0],
        layer.name,
        label=_label(interpretation, judged),
        dead=interpretation.dead[layer.name],
        seen=interpretation.seen,
    )


def _label(interpretation: Interpretation, judged: Prediction) -> str:
    from cvdist.figures.style import confidence

    true = f"class {judged.true}" if judged.true else "class unknown"
    said = f"predicted {judged.predicted}, {confidence(judged.confidence)}"
    return f"{true}; {said}" if interpretation.has_classifier else true


def _exciting(interpretation: Interpretation, source: Source, name: str, weight: Tensor) -> Figure:
    from cvdist.figures.top_activations import top_activation_patches, shown_channels

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


def _right(interpretation: Interpretation, source: Source) -> Figure:
    from cvdist.figures.gradcam import correct_predictions

    images, _ = source.read([one.prediction.row for one in interpretation.right])
    total = interpretation.num_correct + interpretation.num_wrong
    return correct_predictions(interpretation.right, images, interpretation.cam_layer, right=interpretation.num_correct, seen=total)


def _wrong(interpretation: Interpretation, source: Source) -> Figure:
    from cvdist.figures.gradcam import wrong_predictions

    images, _ = source.read([one.prediction.row for one in interpretation.wrong])
    total = interpretation.num_correct + interpretation.num_wrong
    return wrong_predictions(interpretation.wrong, images, interpretation.cam_layer, wrong=interpretation.num_wrong, seen=total)


def _predicted(interpretation: Interpretation, source: Source) -> Figure:
    from cvdist.figures.gradcam import unlabeled_predictions

    images, _ = source.read([one.prediction.row for one in interpretation.unknown])
    return unlabeled_predictions(interpretation.unknown, images, interpretation.cam_layer, seen=interpretation.seen)
