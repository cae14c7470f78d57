"""The metrics, figures and texts that an evaluation logs to its run in MLflow."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from cvdist.evaluation.measure import SHOWN, Evaluations, ModelEvaluation
from cvdist.evaluation.metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mlflow_metrics(measured: Metrics) -> dict[str, float]:
    """Return the metrics by their names in MLflow."""
    found = {f"evaluation/{name}": value for name, value in measured.summary().items() if value is not None}
    if measured.top_correct is not None:
        found["evaluation/top5_accuracy"] = measured.top_correct / measured.total
    return found


def figures(evaluation: Evaluations) -> dict[str, Callable[[], Figure]]:
    """Return the figures of an evaluation by name, each as a function that draws it."""
    drawn: dict[str, Callable[[Evaluations], Figure]] = {"reliability": _reliability}
    if evaluation.first.outcome.multilabel:
        drawn |= {"precision_recall": _precision_recall, "wrong_labels": _most_wrong}
    else:
        drawn |= {"confusion_matrix": _confusion, "most_wrong": _most_wrong}
    if evaluation.comparison is not None:
        drawn["differences"] = _differences
    return {name: functools.partial(draw, evaluation) for name, draw in drawn.items()}


def _confusion(evaluation: Evaluations) -> Figure:
    from cvdist.figures.confusion import confusion_matrix

    first = evaluation.first
    assert first.metrics.confusion is not None
    return confusion_matrix(first.metrics.confusion, first.saved.identity.classes)


def _precision_recall(evaluation: Evaluations) -> Figure:
    from cvdist.figures.precision_recall import precision_recall

    found = evaluation.first.metrics
    assert found.precision_at_recall is not None
    precisions = torch.tensor([one.average_precision or math.nan for one in found.by_class])
    return precision_recall(found.precision_at_recall, precisions, [one.name for one in found.by_class])


def _reliability(evaluation: Evaluations) -> Figure:
    from cvdist.figures.reliability import reliability_diagram

    first = evaluation.first
    return reliability_diagram(
        first.metrics.bins, first.metrics.calibration_error, multilabel=first.outcome.multilabel
    )


def _most_wrong(evaluation: Evaluations) -> Figure:
    from cvdist.figures.pictures import wrong_grid, wrong_labels_grid

    one = evaluation.first
    found = one.outcome
    wrong = (~found.right).nonzero().flatten()
    surest = -found.log_true if found.multilabel else found.confidence
    most = wrong[surest[wrong].argsort(descending=True, stable=True)[:SHOWN]]
    images = evaluation.pictures.pixels(found.rows[most].tolist(), one.saved.identity.height)
    if found.multilabel:
        return wrong_labels_grid(
            images,
            [found.names(found.true & ~found.predicted, row) for row in most.tolist()],
            [found.names(found.predicted & ~found.true, row) for row in most.tolist()],
            title=f"Furthest from their labels ({len(wrong)}/{len(found)} are not all right)",
            total=len(found),
        )
    return wrong_grid(
        images,
        [found.classes[i] for i in found.true[most].tolist()],
        [found.classes[i] for i in found.predicted[most].tolist()],
        found.confidence[most].tolist(),
        title=f"Most confidently wrong ({len(wrong)}/{len(found)} are wrong)",
        total=len(found),
    )


def _differences(evaluation: Evaluations) -> Figure:
    from cvdist.figures.pictures import PredictionCaption, difference_grid

    first, second, comparison = evaluation.first, evaluation.second, evaluation.comparison
    assert second is not None and comparison is not None
    most = comparison.most_different

    def answers(one: ModelEvaluation) -> list[PredictionCaption]:
        found = one.outcome
        sure = found.log_true.exp() if found.multilabel else found.confidence
        return [
            PredictionCaption(found.words(found.predicted, i), float(sure[i]), bool(found.right[i]))
            for i in most.tolist()
        ]

    found = first.outcome
    return difference_grid(
        evaluation.pictures.pixels(found.rows[most].tolist(), first.saved.identity.height),
        [found.words(found.true, i) for i in most.tolist()],
        answers(first),
        answers(second),
        title=f"Where the models differ: only A right {comparison.only_first}, only B right "
        f"{comparison.only_second}, of {comparison.total}",
        subtitle=f"A: {first.saved.name}; B: {second.saved.name}",
    )


def class_table(measured: Metrics) -> str:
    """Format the numbers of each class as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    rows = measured.class_rows()
    writer.writerow(["class", *list(rows[0])[1:]])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def description(evaluation: Evaluations, command: str) -> str:
    """Format the description of an evaluation's run in MLflow, as Markdown."""
    first, comparison = evaluation.first, evaluation.comparison
    lines = [
        f"### {first.metrics}: {first.saved.source}",
        "",
        f"`{command}`",
        "",
        f"On {evaluation.pictures.name}.",
    ]
    if comparison is not None and evaluation.second is not None:
        second = evaluation.second
        lines += [
            "",
            f"Compared with {second.saved.source}: {second.metrics}. "
            f"Both right {comparison.both}, only the first {comparison.only_first}, only the second "
            f"{comparison.only_second}, both wrong {comparison.neither}; McNemar's exact test: "
            f"p = {comparison.p:.3g}.",
        ]
    return "\n".join(lines)
