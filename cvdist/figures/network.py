"""The figures of what a network has learned, by their names below `figures/`.

What draws is imported when something is drawn, so that naming figures costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from cvdist.interpret.layers import ConvLayer
from cvdist.interpret.study import Prediction, Source, Study

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


def of_study(study: Study, source: Source) -> Drawings:
    """Activations, exciting pictures and Grad-CAM; the pictures come from `source` when they are drawn."""
    drawings: Drawings = {}
    for number, (judged, _) in enumerate(study.maps):
        for layer in study.layers:
            name = f"activations/{layer.name}" + (f"-picture-{number + 1}" if number else "")
            drawings[name] = functools.partial(_activations, study, source, number, judged, layer)
    for layer in study.layers:
        if layer.name in study.exciting:
            weight = layer.weight
            drawings[f"exciting/{layer.name}"] = functools.partial(_exciting, study, source, layer.name, weight)
    if study.right:
        drawings["gradcam/right"] = functools.partial(_right, study, source)
    if study.right or study.wrong:
        drawings["gradcam/wrong"] = functools.partial(_wrong, study, source)
    if study.unknown:
        drawings["gradcam/predicted"] = functools.partial(_predicted, study, source)
    return drawings


def _activations(study: Study, source: Source, number: int, judged: Prediction, layer: ConvLayer) -> Figure:
    from cvdist.figures.activations import feature_maps

    images, _ = source.read([judged.row])
    return feature_maps(
        study.maps[number][1][layer.name],
        images[0],
        layer.name,
        label=_label(study, judged),
        dead=study.dead[layer.name],
        seen=study.seen,
    )


def _label(study: Study, judged: Prediction) -> str:
    from cvdist.figures.style import confidence

    true = f"class {judged.true}" if judged.true else "class unknown"
    said = f"predicted {judged.predicted}, {confidence(judged.confidence)}"
    return f"{true}; {said}" if study.explained else true


def _exciting(study: Study, source: Source, name: str, weight: Tensor) -> Figure:
    from cvdist.figures.top_activations import exciting_patches, shown_channels

    found = study.exciting[name]
    rows = sorted({int(row) for channel in shown_channels(found) for row in found.pictures[channel]})
    images, labels = source.read(rows)
    return exciting_patches(
        found,
        dict(zip(rows, images, strict=True)),
        dict(zip(rows, labels, strict=True)),
        weight,
        name,
        seen=study.seen,
        available=study.available,
        dead=len(study.dead[name]),
    )


def _right(study: Study, source: Source) -> Figure:
    from cvdist.figures.gradcam import right_ones

    images, _ = source.read([one.judged.row for one in study.right])
    total = study.num_correct + study.num_wrong
    return right_ones(study.right, images, study.cam_layer, right=study.num_correct, seen=total)


def _wrong(study: Study, source: Source) -> Figure:
    from cvdist.figures.gradcam import wrong_ones

    images, _ = source.read([one.judged.row for one in study.wrong])
    total = study.num_correct + study.num_wrong
    return wrong_ones(study.wrong, images, study.cam_layer, wrong=study.num_wrong, seen=total)


def _predicted(study: Study, source: Source) -> Figure:
    from cvdist.figures.gradcam import predicted_ones

    images, _ = source.read([one.judged.row for one in study.unknown])
    return predicted_ones(study.unknown, images, study.cam_layer, seen=study.seen)
