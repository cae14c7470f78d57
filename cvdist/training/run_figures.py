"""The figures that a run logs: pictures of the data, curves, the confusion matrix, and the worst mistakes.

Each function that returns a function draws nothing by itself: the tracker draws in a thread of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvdist.data.dataset import Batch, Loader
from cvdist.data.labels import NO_CLASS, targets_of
from cvdist.data.sampler import LocalBatch
from cvdist.results import EpochRecord, Evaluation, LogisticResult
from cvdist.seeding import generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

FIGURES = {
    "samples": "training pictures with their labels",
    "augmentation": "what augmentation and mixtures make of them, if there are any",
    "loss": "loss of both phases by epoch",
    "accuracy": "accuracy of both phases by epoch",
    "penalties": "accuracy and loss on held-out training pictures by penalty, for logistic regression",
    "confusion_matrix": "which class was taken for which, at the best epoch",
    "most_wrong": "the validation pictures that were wrong with most confidence",
}
# Figures that replace two of those above where a picture may have several classes, and what they show.
_MULTILABEL = {
    "accuracy": ("average_precision", "mean average precision on the validation pictures by epoch"),
    "confusion_matrix": ("precision_recall", "precision by recall of the classes, at the best epoch"),
    "most_wrong": ("wrong_labels", "the validation pictures with the most wrong classes"),
}

FOLDERS = {
    "filters": "what the convolutions look for; `forming.gif`: how they came about",
    "activations": "what they make of a picture, before and after ReLU",
    "top_activations": "the validation pictures that activate their channels most",
    "gradcam": "which part of a picture spoke for the prediction, right and wrong ones",
}


def names(*, multilabel: bool) -> dict[str, str]:
    """Return the names of a run's figures and what each of them shows."""
    return dict(
        _MULTILABEL.get(one, (one, what)) if multilabel else (one, what) for one, what in FIGURES.items()
    )


def samples(loader: Loader) -> Callable[[], Figure]:
    """Return a function that draws 32 training pictures, the same ones for every run on the data."""

    def draw() -> Figure:
        from cvdist.figures.pictures import picture_grid

        images, labels = loader.pictures("train", _sampled_rows(loader, 32))
        return picture_grid(images, labels, title=f"{loader.info.name}: training pictures")

    return draw


def augmentation(loader: Loader) -> Callable[[], Figure]:
    """Return a function that draws eight training pictures, and below each what three epochs make of it.

    Below mixtures are the shares of both labels.
    """

    def draw() -> Figure:
        from cvdist.figures.pictures import picture_grid

        rows, epochs = _sampled_rows(loader, 8), 3
        images, labels = loader.pictures("train", rows)
        everyone = torch.tensor([*rows[-1:], *rows])  # mixtures take the one before, and the last precedes
        local = LocalBatch(everyone, start=0, offset=-1, global_size=len(rows))
        known = targets_of(loader.labels("train")[everyone])
        shown, titles = [images], list(labels)
        for epoch in range(1, epochs + 1):
            changed = torch.cat([images[-1:], images]).float()
            if loader.augmentation is not None:
                draws = loader.augmentation.draw(local, epoch)
                changed = loader.augmentation.apply(changed, draws, loader.info.mean)
            names = [f"epoch {epoch}"] * len(rows)
            if loader.mixing is None:
                changed = changed[1:]
            else:
                mixture = loader.mixing.draw(epoch, local.start)
                mixed = loader.mixing.mix(Batch(changed, known, everyone, len(rows)), mixture)
                changed, names = mixed.images, [_shares(one, loader.info.classes) for one in mixed.labels]
            shown.append(changed.round().clamp(0, 255).to(torch.uint8))
            titles += names
        title = f"{loader.info.name}: as it is, and as the network sees it in three epochs"
        return picture_grid(torch.cat(shown), titles, title=title, columns=len(rows))

    return draw


def results(
    loader: Loader, history: Sequence[EpochRecord], best: Evaluation
) -> dict[str, Callable[[], Figure]]:
    """Return functions that draw the figures of a finished run, by the figures' names.

    Args:
        loader: The data.
        history: The results of all epochs.
        best: The evaluation of the best epoch.
    """
    classes, labels = loader.info.classes, best.labels

    def wrong() -> Figure:
        from cvdist.figures.pictures import wrong_grid, wrong_labels_grid

        images, true = loader.pictures("valid", [mistake.index for mistake in best.mistakes])
        count = best.total - best.correct
        if labels is None:
            return wrong_grid(
                images,
                true,
                [classes[mistake.predicted[0]] for mistake in best.mistakes],
                [mistake.confidence for mistake in best.mistakes],
                title=f"Most confidently wrong ({count}/{best.total} are wrong)",
                total=best.total,
            )
        both = [(set(mistake.true), set(mistake.predicted)) for mistake in best.mistakes]
        return wrong_labels_grid(
            images,
            [[classes[one] for one in sorted(true - taken)] for true, taken in both],
            [[classes[one] for one in sorted(taken - true)] for true, taken in both],
            title=f"Most labels wrong ({count}/{best.total} are not all right)",
            total=best.total,
        )

    def draw(name: str) -> Figure:
        from cvdist.figures import confusion, curves, precision_recall

        if name == "loss":
            return curves.loss_curves(history)
        if name == "accuracy":
            return curves.accuracy_curves(history)
        if name == "average_precision":
            return curves.average_precision_curve(history)
        if best.confusion is not None:
            return confusion.confusion_matrix(best.confusion, classes)
        assert labels is not None
        return precision_recall.precision_recall(labels.curves, labels.average_precision, classes)

    names = ("loss", "accuracy", "confusion_matrix")
    if labels is not None:
        names = ("loss", "average_precision", "precision_recall")
    drawn = {name: functools.partial(draw, name) for name in names}
    return drawn | {"most_wrong" if labels is None else "wrong_labels": wrong}


def penalties(fitted: LogisticResult) -> Callable[[], Figure]:
    """Return a function that draws how well each penalty of logistic regression did on held-out pictures."""

    def draw() -> Figure:
        from cvdist.figures.penalties import penalty_curve

        return penalty_curve(fitted)

    return draw


def _shares(label: Tensor, classes: Sequence[str]) -> str:
    """Return the classes with a share in a mixture, the larger one first, one in a line."""
    shares, order = label.sort(descending=True)
    pairs = zip(shares.tolist(), order.tolist(), strict=True)
    return "\n".join(f"{share:.0%} {classes[label]}" for share, label in pairs if share >= 0.005) or NO_CLASS


def _sampled_rows(loader: Loader, most: int) -> list[int]:
    count = min(most, loader.info.train_size)
    rows: list[int] = torch.randperm(loader.info.train_size, generator=generator("samples"))[:count].tolist()
    return rows
