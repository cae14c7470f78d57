"""Section, title and explanation of each figure in a report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

CURVES = "Curves"
PRECISION = "Precision by recall"
CONFUSION = "Confusion matrix"
MISTAKES = "Most wrong"
FILTERS = "Filters"
ACTIVATIONS = "Activations"
TOP_ACTIVATIONS = "Top activations"
GRADCAM = "What a prediction rests on"
DATA = "Training pictures"
OTHER = "Other figures"

# Sections in the order of the page, with their introductions.
SECTIONS = {
    CURVES: "Both losses should fall together, and both accuracies rise. If training goes on improving while "
    "validation stalls or gets worse, the model overfits.",
    PRECISION: "",
    CONFUSION: "",
    MISTAKES: "",
    DATA: "",
    FILTERS: "The weights of convolution layers. Each tile is one filter or, in layers with many input "
    "channels, one channel of a filter. White is zero, blue negative and orange positive, on one scale for the "
    "whole figure. Filters of a first layer on RGB pictures are shown in color.",
    ACTIVATIONS: "The feature maps of a layer for one validation picture, one tile for each channel. Before "
    "ReLU, white is zero, blue negative and orange positive. After ReLU, dark is zero and bright a strong "
    "activation. A channel that is zero for all pictures is dead: it does not contribute to any prediction.",
    TOP_ACTIVATIONS: "The validation pictures that activate a channel most, one row for each channel, the "
    "strongest first: a hint at what the channel has learned to detect. The box is the part of the picture "
    "that the activation depends on.",
    GRADCAM: "Grad-CAM: bright parts of a picture raise the score of the class named below it, dark parts do "
    "not. A model that is right for the right reason looks at the object rather than at its surroundings.",
    OTHER: "",
}
# Most important first: if a report would be too large, figures are left out from the end.
_BY_IMPORTANCE = (
    *(CURVES, PRECISION, CONFUSION, MISTAKES, FILTERS),
    *(GRADCAM, ACTIVATIONS, TOP_ACTIVATIONS, DATA, OTHER),
)


@dataclass(frozen=True)
class Caption:
    """What a report says about a figure.

    Attributes:
        section: Title of its section, a key of `SECTIONS`.
        alt: Description for readers who can't see the figure.
        text: Explanation below the figure. May be empty.
        title: Title above the figure. May be empty.
        rank: Sorts the figures within a section.
    """

    section: str
    alt: str
    text: str = ""
    title: str = ""
    rank: tuple[int, str] = (0, "")


# Captions by a pattern for the figure's path without its suffix; title and alt text may refer to its groups.
# The first pattern that matches counts. Within a section, figures have the order of their patterns.
_CAPTIONS = {
    "loss": Caption(
        CURVES,
        "Line chart of the training and the validation loss by epoch.",
        "Cross-entropy by epoch; lower is better. The marked point is the least validation loss, which is not "
        "always at the best epoch.",
    ),
    "accuracy": Caption(
        CURVES,
        "Line chart of the training and the validation accuracy by epoch.",
        "Fraction of correctly classified pictures by epoch. Training accuracy is measured while the weights "
        "change, with dropout and augmentation, so it may lie below validation accuracy. Of mixed pictures the "
        "label with the larger share counts.",
    ),
    "average_precision": Caption(
        CURVES,
        "Line chart of mean average precision and macro F1 on the validation pictures by epoch.",
        "Mean average precision says how well each class ranks its pictures before all others, over all "
        "thresholds. Macro F1 is at the thresholds with the highest F1 score of each epoch.",
    ),
    "penalties": Caption(
        CURVES,
        "Line chart of the accuracy on held-out training pictures by L2 penalty.",
        "Training pictures that were held out while a linear head was fitted with each penalty of a logistic "
        "regression. The ring is the chosen penalty.",
    ),
    "precision_recall": Caption(
        PRECISION,
        "A chart of precision by recall for each class, with its average precision.",
        "Validation pictures at the best epoch. Recall is the share of a class's pictures that are found, "
        "precision the share of what is found that is right, as the threshold falls. Average precision is the "
        "area below.",
    ),
    "confusion_matrix": Caption(
        CONFUSION,
        "Matrix of true against predicted classes, with the number of validation pictures in each cell.",
        "Validation pictures at the best epoch. Rows are true classes, columns predicted classes. Gray cells "
        "are correct; colored cells are mistakes, the darker the larger their share of the true class.",
    ),
    "most_wrong": Caption(
        MISTAKES,
        "Grid of misclassified validation pictures with true class, predicted class and confidence.",
        "The wrongly classified validation pictures with the highest confidence: true class, predicted class "
        "and its probability. Wrong labels are often found here.",
    ),
    "wrong_labels": Caption(
        MISTAKES,
        "Grid of validation pictures with the labels that were missed and those that are not there.",
        "The validation pictures with the most labels wrong: those that the network missed, and those that it "
        "saw and the data does not have. Wrong labels are often found here.",
    ),
    "samples": Caption(
        DATA, "Grid of training pictures with labels.", "A random sample with labels.", "As they are"
    ),
    "augmentation": Caption(
        DATA,
        "Grid of training pictures, the original in the first row and what the network sees of it below.",
        "The first row shows the original pictures; each row below shows what the network sees in one epoch. "
        "Below mixtures are the shares of their labels.",
        "As the network sees them",
    ),
    "filters/forming": Caption(
        FILTERS,
        "Animation of a layer's filters over the epochs of the training.",
        "How the filters develop from random weights, epoch by epoch. The animation loops.",
    ),
    r"filters/(?!.*-epoch-\d+$|.*-before-after$)(.+)": Caption(FILTERS, r"Grid of the filters of \1."),
    "filters/(.+)-before-after": Caption(
        FILTERS,
        r"Two grids of the filters of \1, before and after the training.",
        "The same filters before and after training, on one color scale, and the difference.",
    ),
    r"filters/(.+)-epoch-0*(\d+)": Caption(FILTERS, r"Grid of the filters of \1 after epoch \2."),
    "activations/(.+)": Caption(ACTIVATIONS, r"Input picture and the feature maps of \1."),
    "top_activations/(.+)": Caption(
        TOP_ACTIVATIONS, r"Validation pictures that activate the channels of \1 most."
    ),
    "gradcam/right": Caption(
        GRADCAM,
        "Correctly classified pictures, overlaid with a heat map of what the prediction rests on.",
        "Correct predictions.",
    ),
    "gradcam/wrong": Caption(
        GRADCAM,
        "Wrongly classified pictures, overlaid with a heat map of what the prediction rests on.",
        "Wrong predictions: what raised the score of the predicted class, and what that of the true class.",
    ),
    "gradcam/(.+)": Caption(GRADCAM, r"Grad-CAM heat maps: \1.", title=r"\1"),
    "([^/]+)": Caption(OTHER, r"Figure \1.", title=r"\1"),
    "(.+)": Caption(OTHER, r"Figure \1.", title=r"\1"),
}
_SNAPSHOT = re.compile(r"(?P<layer>filters/.+)-epoch-\d+\.\w+")


def introductions(*, multilabel: bool) -> dict[str, str]:
    """Return the introductions of the sections of a run whose pictures have one class, or several."""
    curves = SECTIONS[CURVES]
    if multilabel:
        curves = curves.replace("both accuracies rise", "mean average precision rise")
    return SECTIONS | {CURVES: curves}


def caption(path: str) -> Caption:
    """Return what the report says about the figure at `path`, below the run's `figures/` folder."""
    name = str(PurePosixPath(path).with_suffix(""))
    place, known, match = next(
        (place, known, match)
        for place, (pattern, known) in enumerate(_CAPTIONS.items())
        if (match := re.fullmatch(pattern, name, re.DOTALL))
    )
    # Numbers are compared as numbers: features.2 comes before features.10.
    rank = place, re.sub(r"\d+", lambda number: number[0].zfill(9), name)
    alt = match.expand(known.alt).replace("after epoch 0.", "before the training.")
    return replace(known, alt=alt, title=match.expand(known.title), rank=rank)


def order_figures(paths: Iterable[str]) -> list[tuple[str, Caption]]:
    """Sort figures by section in the order of the report, and within a section by rank; with their captions."""
    sections = list(SECTIONS)
    captioned = [(path, caption(path)) for path in paths]
    return sorted(captioned, key=lambda pair: (sections.index(pair[1].section), pair[1].rank, pair[0]))


def importance(path: str) -> tuple[int, tuple[int, str], str]:
    """Return a key that sorts figures by importance, the most important first."""
    found = caption(path)
    return _BY_IMPORTANCE.index(found.section), found.rank, path


def select_figures(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Select the figures of a run that a report shows.

    Of the snapshots of a layer's filters, it shows the first and the last one, or none if another figure
    compares the filters before and after training. Of figures in two formats, it shows the PNG or GIF file.

    Args:
        paths: Paths of all figures, below the run's `figures/` folder.

    Returns:
        The selected paths, the most important first, and one line for each group of figures that is left out.
    """
    rasters = {path.rpartition(".")[0] for path in paths if path.endswith((".png", ".gif"))}
    selected = {path for path in paths if not path.endswith(".svg") or path.removesuffix(".svg") not in rasters}
    snapshots: dict[str, list[str]] = {}
    for path in sorted(selected, key=importance):
        if match := _SNAPSHOT.fullmatch(path):
            snapshots.setdefault(match["layer"], []).append(path)
    left_out = []
    for layer, found in snapshots.items():
        left = found if f"{layer}-before-after.png" in selected else found[1:-1]
        selected -= set(left)
        if left:
            left_out.append(f"{len(left)} snapshots of a layer's filters: figures/{layer}-epoch-*")
    return sorted(selected, key=importance), left_out
