"""What a report says of each figure: its place, its title, and how it is read."""

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
EXCITING = "What excites a channel"
GRADCAM = "What a prediction rests on"
DATA = "Training pictures"
OTHER = "Other figures"

SECTIONS = {
    CURVES: (
        "Solid progress is both lines falling (loss) or rising (accuracy) together. Training going on to "
        "improve while validation stands still or turns is over-fitting."
    ),
    CONFUSION: "",
    MISTAKES: "",
    DATA: "",
    FILTERS: (
        "The weights that the network slides over its input. A tile is one filter; in layers that see many "
        "channels, one or some of its channels. White is exactly zero, and the two colours are its two "
        "sides, on one scale for all of a figure; a first layer that sees colours is shown in colour."
    ),
    ACTIVATIONS: (
        "What a layer makes of one validation picture, a tile for each channel. Before ReLU white is zero "
        "and the two colours are its two sides; after ReLU dark is zero and bright a strong answer. A "
        "channel that is zero for all pictures is dead: it has no part in any decision."
    ),
    EXCITING: (
        "The validation pictures that a channel answers most strongly to, a row for each channel, the "
        "strongest first: a hint at what it has learned to look for. The box is the part that the answer "
        "depends on."
    ),
    GRADCAM: (
        "Grad-CAM: where a picture is bright, it speaks for the class named below it; where it is dark, it "
        "has no say. A model that is right for the right reason looks at the object, not at its "
        "surroundings."
    ),
    OTHER: "",
}

_SNAPSHOT = re.compile(r"(?P<layer>.+)-epoch-(?P<epoch>\d+)$")
# Where little room is left, what comes first here stays longest.
_BY_WEIGHT = (CURVES, CONFUSION, MISTAKES, FILTERS, GRADCAM, ACTIVATIONS, EXCITING, DATA, OTHER)


@dataclass(frozen=True)
class Caption:
    """`alt` says what is to be seen to those who don't see it; `rank` orders the figures of a section."""

    section: str
    title: str
    text: str
    alt: str
    rank: tuple[int, str] = (0, "")


_KNOWN = {
    "loss": Caption(
        CURVES,
        "",
        "Cross-entropy by epoch, lower is better. The marked point is the least validation loss, which need "
        "not be at the epoch with the best accuracy.",
        "Line chart of the training and the validation loss by epoch.",
    ),
    "accuracy": Caption(
        CURVES,
        "",
        "Share of pictures classified right, by epoch. Training is measured while the weights move and "
        "dropout and augmentation are at work, so it may lie below validation.",
        "Line chart of the training and the validation accuracy by epoch.",
        (1, ""),
    ),
    "confusion_matrix": Caption(
        CONFUSION,
        "",
        "A row for each true class, a column for each predicted one, validation pictures at the best epoch. "
        "Grey cells are right, coloured ones mistakes: the darker, the more of a true class ended up there.",
        "Matrix of true against predicted classes, with the number of validation pictures in each cell.",
    ),
    "most_wrong": Caption(
        MISTAKES,
        "",
        "Of the validation pictures that were classified wrongly, those the model was surest about: the true "
        "class, what it was read as, and with which probability. Wrong labels are often found here.",
        "Grid of misclassified validation pictures with true class, predicted class and confidence.",
    ),
    "samples": Caption(
        DATA, "As they are", "A random choice, with their labels.", "Grid of training pictures with labels."
    ),
    "augmentation": Caption(
        DATA,
        "As the network sees them",
        "The first row as it is; each row below is what one epoch's augmentation makes of it.",
        "Grid of training pictures, the original in the first row and augmented versions below.",
        (1, ""),
    ),
    "filters/forming": Caption(
        FILTERS,
        "",
        "How the filters form, epoch by epoch, from random weights. It runs in a loop.",
        "Animation of a layer's filters over the epochs of the training.",
    ),
    "gradcam/right": Caption(
        GRADCAM,
        "",
        "Predictions that are right.",
        "Pictures that were classified right, overlaid with a heat map of what the prediction rests on.",
    ),
    "gradcam/wrong": Caption(
        GRADCAM,
        "",
        "Predictions that are wrong: what spoke for the predicted class, and what for the true one.",
        "Pictures that were classified wrongly, overlaid with a heat map of what the prediction rests on.",
        (1, ""),
    ),
}


def caption(path: str) -> Caption:
    """What to say of the figure at `path` (below the run's figures)."""
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
            EXCITING,
            "",
            "",
            f"Validation pictures that excite the channels of {rest} most.",
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
            "The same filters before the training and after it, on one scale of colours, and what has changed.",
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
    """Orders `features.2` before `features.10`."""
    return 0, re.sub(r"\d+", lambda number: number[0].zfill(9), name)


def in_order(paths: Iterable[str]) -> list[tuple[str, Caption]]:
    """Sections in the report's order, figures within them by rank."""
    sections = list(SECTIONS)
    captioned = [(path, caption(path)) for path in paths]
    return sorted(captioned, key=lambda pair: (sections.index(pair[1].section), pair[1].rank, pair[0]))


def weight(path: str) -> tuple[int, tuple[int, str]]:
    """Sorts by importance, the most important first."""
    said = caption(path)
    return _BY_WEIGHT.index(said.section), said.rank


def chosen(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of a run's figures a report shows, and a line for each kind that it doesn't.

    Of a layer's snapshots the first and the last, or none where a figure compares before and after; of figures
    in two formats the one of pixels.
    """
    taken = {path for path in paths if not _is_drawing(path) or not _twins(path) & set(paths)}
    snapshots: dict[str, list[str]] = {}
    for path in sorted(taken):
        if path.startswith("filters/") and (match := _SNAPSHOT.match(str(PurePosixPath(path).with_suffix("")))):
            snapshots.setdefault(match["layer"], []).append(path)
    left_out = []
    for layer, found in snapshots.items():
        found.sort(key=lambda path: weight(path)[1])
        left = found if f"{layer}-before-after.png" in taken else found[1:-1]
        taken -= set(left)
        if left:
            left_out.append(f"{len(left)} snapshots of a layer's filters: figures/{layer}-epoch-*")
    return sorted(taken, key=lambda path: (weight(path), path)), left_out


def _is_drawing(path: str) -> bool:
    return path.endswith(".svg")


def _twins(path: str) -> set[str]:
    return {str(PurePosixPath(path).with_suffix(suffix)) for suffix in (".png", ".gif")}
