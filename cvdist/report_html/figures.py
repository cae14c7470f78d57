"""Section, title and explanation of each figure in a report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

CURVES = "Curves"
CONFUSION = "Confusion matrix"
MISTAKES = "Most wrong"
FILTERS = "Filters"
ACTIVATIONS = "Activations"
TOP_ACTIVATIONS = "Top activations"
GRADCAM = "What a prediction rests on"
DATA = "Training pictures"
OTHER = "Other figures"

SECTIONS = {
    CURVES: (
        "Both losses should fall together, and both accuracies rise. If training goes on improving while "
        "validation stalls or gets worse, the model overfits."
    ),
    CONFUSION: "",
    MISTAKES: "",
    DATA: "",
    FILTERS: (
        "The weights of convolution layers. Each tile is one filter or, in layers with many input channels, "
        "one channel of a filter. White is zero, blue negative and orange positive, on one scale for the "
        "whole figure. Filters of a first layer on RGB pictures are shown in color."
    ),
    ACTIVATIONS: (
        "The feature maps of a layer for one validation picture, one tile for each channel. Before ReLU, "
        "white is zero, blue negative and orange positive. After ReLU, dark is zero and bright a strong "
        "activation. A channel that is zero for all pictures is dead: it does not contribute to any prediction."
    ),
    TOP_ACTIVATIONS: (
        "The validation pictures that activate a channel most, one row for each channel, the strongest first: "
        "a hint at what the channel has learned to detect. The box is the part of the picture that the "
        "activation depends on."
    ),
    GRADCAM: (
        "Grad-CAM: bright parts of a picture raise the score of the class named below it, dark parts do not. A "
        "model that is right for the right reason looks at the object rather than at its surroundings."
    ),
    OTHER: "",
}

_SNAPSHOT = re.compile(r"(?P<layer>.+)-epoch-(?P<epoch>\d+)$")
# Most important first: if a report would be too large, figures are left out from the end.
_BY_IMPORTANCE = (CURVES, CONFUSION, MISTAKES, FILTERS, GRADCAM, ACTIVATIONS, TOP_ACTIVATIONS, DATA, OTHER)


@dataclass(frozen=True)
class Caption:
    """What a report says about a figure.

    Attributes:
        section: Title of its section, a key of `SECTIONS`.
        title: Title above the figure. May be empty.
        text: Explanation below the figure. May be empty.
        alt: Description for readers who can't see the figure.
        rank: Sorts the figures within a section.
    """

    section: str
    title: str
    text: str
    alt: str
    rank: tuple[int, str] = (0, "")


_KNOWN = {
    "loss": Caption(
        CURVES,
        "",
        "Cross-entropy by epoch; lower is better. The marked point is the least validation loss, which is not "
        "always at the epoch with the best accuracy.",
        "Line chart of the training and the validation loss by epoch.",
    ),
    "accuracy": Caption(
        CURVES,
        "",
        "Fraction of correctly classified pictures by epoch. Training accuracy is measured while the weights "
        "change, with dropout and augmentation, so it may lie below validation accuracy.",
        "Line chart of the training and the validation accuracy by epoch.",
        (1, ""),
    ),
    "confusion_matrix": Caption(
        CONFUSION,
        "",
        "Validation pictures at the best epoch. Rows are true classes, columns predicted classes. Gray cells "
        "are correct; colored cells are mistakes, the darker the larger their share of the true class.",
        "Matrix of true against predicted classes, with the number of validation pictures in each cell.",
    ),
    "most_wrong": Caption(
        MISTAKES,
        "",
        "The wrongly classified validation pictures with the highest confidence: true class, predicted class "
        "and its probability. Wrong labels are often found here.",
        "Grid of misclassified validation pictures with true class, predicted class and confidence.",
    ),
    "samples": Caption(
        DATA, "As they are", "A random sample with labels.", "Grid of training pictures with labels."
    ),
    "augmentation": Caption(
        DATA,
        "As the network sees them",
        "The first row shows the original pictures; each row below shows the augmented pictures of one epoch.",
        "Grid of training pictures, the original in the first row and augmented versions below.",
        (1, ""),
    ),
    "filters/forming": Caption(
        FILTERS,
        "",
        "How the filters develop from random weights, epoch by epoch. The animation loops.",
        "Animation of a layer's filters over the epochs of the training.",
    ),
    "gradcam/right": Caption(
        GRADCAM,
        "",
        "Correct predictions.",
        "Correctly classified pictures, overlaid with a heat map of what the prediction rests on.",
    ),
    "gradcam/wrong": Caption(
        GRADCAM,
        "",
        "Wrong predictions: what raised the score of the predicted class, and what that of the true class.",
        "Wrongly classified pictures, overlaid with a heat map of what the prediction rests on.",
        (1, ""),
    ),
}


def caption(path: str) -> Caption:
    """Return what the report says about the figure at `path`, below the run's `figures/` folder."""
    name = str(PurePosixPath(path).with_suffix(""))
    if known := _KNOWN.get(name):
        return known
    folder, _, rest = name.partition("/")
    if not rest:
        return Caption(OTHER, name, "", f"Figure {name}.", (0, name))
    if folder == "filters":
        return _filters(rest)
    if folder == "activations":
        return Caption(
            ACTIVATIONS,
            "",
            "",
            f"Input picture and the feature maps of {rest}.",
            _natural(rest),
        )
    if folder == "top_activations":
        return Caption(
            TOP_ACTIVATIONS,
            "",
            "",
            f"Validation pictures that activate the channels of {rest} most.",
            _natural(rest),
        )
    if folder == "gradcam":
        return Caption(GRADCAM, rest, "", f"Grad-CAM heat maps: {rest}.", (2, rest))
    return Caption(OTHER, name, "", f"Figure {name}.", (1, name))


def _filters(name: str) -> Caption:
    if snapshot := _SNAPSHOT.match(name):
        layer, epoch = snapshot["layer"], int(snapshot["epoch"])
        when = f"after epoch {epoch}" if epoch else "before the training"
        alt = f"Grid of the filters of {layer} {when}."
        return Caption(FILTERS, "", "", alt, (3, f"{layer} {epoch:09}"))
    if name.endswith("-before-after"):
        layer = name.removesuffix("-before-after")
        return Caption(
            FILTERS,
            "",
            "The same filters before and after training, on one color scale, and the difference.",
            f"Two grids of the filters of {layer}, before and after the training.",
            (2, layer),
        )
    return Caption(
        FILTERS,
        "",
        "",
        f"Grid of the filters of {name}.",
        (1, _natural(name)[1]),
    )


def _natural(name: str) -> tuple[int, str]:
    """Return a key that sorts `features.2` before `features.10`."""
    return 0, re.sub(r"\d+", lambda number: number[0].zfill(9), name)


def order_figures(paths: Iterable[str]) -> list[tuple[str, Caption]]:
    """Sort figures by section in the order of the report, and within a section by rank.

    Returns them with captions.
    """
    sections = list(SECTIONS)
    captioned = [(path, caption(path)) for path in paths]
    return sorted(captioned, key=lambda pair: (sections.index(pair[1].section), pair[1].rank, pair[0]))


def importance(path: str) -> tuple[int, tuple[int, str]]:
    """Return a key that sorts figures by importance, the most important first."""
    found = caption(path)
    return _BY_IMPORTANCE.index(found.section), found.rank


def select_figures(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Select the figures of a run that a report shows.

    Of the snapshots of a layer's filters, it shows the first and the last one, or none if another figure
    compares the filters before and after training. Of figures in two formats, it shows the PNG or GIF file.

    Args:
        paths: Paths of all figures, below the run's `figures/` folder.

    Returns:
        The selected paths, the most important first, and one line for each group of figures that is left out.
    """
    selected = {path for path in paths if not _is_svg(path) or not _raster_paths(path) & set(paths)}
    snapshots: dict[str, list[str]] = {}
    for path in sorted(selected):
        if path.startswith("filters/") and (match := _SNAPSHOT.match(str(PurePosixPath(path).with_suffix("")))):
            snapshots.setdefault(match["layer"], []).append(path)
    left_out = []
    for layer, found in snapshots.items():
        found.sort(key=lambda path: importance(path)[1])
        left = found if f"{layer}-before-after.png" in selected else found[1:-1]
        selected -= set(left)
        if left:
            left_out.append(f"{len(left)} snapshots of a layer's filters: figures/{layer}-epoch-*")
    return sorted(selected, key=lambda path: (importance(path), path)), left_out


def _is_svg(path: str) -> bool:
    return path.endswith(".svg")


def _raster_paths(path: str) -> set[str]:
    """Return the paths that the same figure would have as a PNG or GIF file."""
    return {str(PurePosixPath(path).with_suffix(suffix)) for suffix in (".png", ".gif")}
