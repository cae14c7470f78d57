"""The figures that show what a network has learned, by their paths below the run's `figures/` folder.

matplotlib is imported when a figure is drawn, so that a process that only names figures does not load it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from cvdist.interpret.interpretation import ExplainedPrediction, Interpretation, PictureSource, Prediction
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


def interpretation_figures(found: Interpretation, source: PictureSource) -> Drawings:
    """Return the figures of an interpretation: activations, top activations and Grad-CAM.

    Args:
        found: What was found out about the model.
        source: Where each figure reads its pictures when it is drawn.
    """

    def activations(number: int, prediction: Prediction, layer: ConvLayer) -> Figure:
        from cvdist.figures.activations import feature_maps
        from cvdist.figures.style import confidence

        label = f"class {prediction.true}" if prediction.true else "class unknown"
        if found.has_classifier:
            label += f"; predicted {prediction.predicted}, {confidence(prediction.confidence)}"
        images, _ = source.read([prediction.row])
        shown, dead = found.maps[number][1][layer.name], found.dead.get(layer.name, [])
        return feature_maps(shown, images[0], layer.name, label=label, dead=dead, seen=found.seen)

    def top_activations(name: str, weight: Tensor) -> Figure:
        from cvdist.figures.top_activations import shown_channels, top_activation_patches

        top = found.top_activations[name]
        rows = sorted({int(row) for channel in shown_channels(top) for row in top.pictures[channel]})
        images, labels = source.read(rows)
        pictures, named = dict(zip(rows, images, strict=True)), dict(zip(rows, labels, strict=True))
        counts = {"seen": found.seen, "available": found.available, "dead": len(found.dead.get(name, []))}
        return top_activation_patches(top, pictures, named, weight, name, **counts)

    def grad_cam(explained: Sequence[ExplainedPrediction], title: str, counts: str) -> Figure:
        from cvdist.figures.gradcam import explained_predictions

        images, _ = source.read([one.prediction.row for one in explained])
        return explained_predictions(explained, images, found.cam_layer, title=title, counts=counts)

    def nothing_wrong() -> Figure:
        from cvdist.figures.style import nothing_to_show

        return nothing_to_show("Grad-CAM: what misled the network", f"no mistakes: all {total}/{total} right")

    drawings: Drawings = {}
    for number, (prediction, _) in enumerate(found.maps):
        for layer in found.layers:
            name = f"activations/{layer.name}" + (f"-picture-{number + 1}" if number else "")
            drawings[name] = functools.partial(activations, number, prediction, layer)
    for layer in found.layers:
        if layer.name in found.top_activations:
            draw = functools.partial(top_activations, layer.name, layer.weight)
            drawings[f"top_activations/{layer.name}"] = draw
    total = found.num_correct + found.num_wrong
    right, wrong = f"{found.num_correct}/{total} right", f"{found.num_wrong}/{total} wrong"
    for name, explained, title, counts in (
        ("right", found.correct, "what spoke for the right answer", right),
        ("wrong", found.wrong, "what misled the network", f"{wrong}, those with most confidence"),
        (
            "predicted",
            found.unlabeled,
            "what spoke for the prediction",
            f"{len(found.unlabeled)} of {found.seen}",
        ),
    ):
        if explained:
            drawings[f"gradcam/{name}"] = functools.partial(grad_cam, explained, title, counts)
    if found.correct and not found.wrong:
        drawings["gradcam/wrong"] = nothing_wrong
    return drawings
