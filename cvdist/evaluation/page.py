"""The metrics, figures and texts that an evaluation logs to its run in MLflow."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from cvdist import log
from cvdist.evaluation.measure import SHOWN, Evaluations, ModelEvaluation
from cvdist.evaluation.metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mlflow_metrics(measured: Metrics) -> dict[str, float]:
    """Metrics by their names in MLflow."""
    found: dict[str, float] = {
        "evaluation/accuracy": measured.correct / measured.total,
        "evaluation/correct": measured.correct,
        "evaluation/total": measured.total,
        "evaluation/loss": measured.loss,
        "evaluation/brier_score": measured.brier,
        "evaluation/expected_calibration_error": measured.calibration_error,
        "evaluation/balanced_accuracy": measured.balanced_accuracy,
        "evaluation/macro_f1": measured.macro_f1,
    }
    if measured.top_correct is not None:
        found["evaluation/top5_accuracy"] = measured.top_correct / measured.total
        found["evaluation/top5_correct"] = measured.top_correct
    return found


def figures(evaluation: Evaluations) -> dict[str, Callable[[], Figure]]:
    """Return the figures of an evaluation by name, each as a function that draws it."""
    drawn = {"confusion_matrix": _confusion, "reliability": _reliability, "most_wrong": _most_wrong}
    if evaluation.comparison is not None:
        drawn["differences"] = _differences
    return {name: functools.partial(draw, evaluation) for name, draw in drawn.items()}


def _confusion(evaluation: Evaluations) -> Figure:
    from cvdist.figures.confusion import confusion_matrix

    first = evaluation.first
    return confusion_matrix(first.metrics.confusion, first.saved.identity.classes)


def _reliability(evaluation: Evaluations) -> Figure:
    from cvdist.figures.reliability import reliability_diagram

    return reliability_diagram(evaluation.first.metrics.bins, evaluation.first.metrics.calibration_error)


def _most_wrong(evaluation: Evaluations) -> Figure:
    from cvdist.figures.pictures import wrong_grid

    one = evaluation.first
    found, classes = one.outcome, one.saved.identity.classes
    wrong = (~found.right).nonzero().flatten()
    most = wrong[found.confidence[wrong].argsort(descending=True, stable=True)[:SHOWN]]
    return wrong_grid(
        evaluation.pictures.pixels(found.rows[most].tolist(), one.saved.identity.height),
        [classes[i] for i in found.true[most].tolist()],
        [classes[i] for i in found.predicted[most].tolist()],
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
        return [
            PredictionCaption(
                found.classes[int(found.predicted[i])], float(found.confidence[i]), bool(found.right[i])
            )
            for i in most.tolist()
        ]

    found = first.outcome
    return difference_grid(
        evaluation.pictures.pixels(found.rows[most].tolist(), first.saved.identity.height),
        [found.classes[i] for i in found.true[most].tolist()],
        answers(first),
        answers(second),
        title=f"Where the models differ: only A right {comparison.only_first}, only B right "
        f"{comparison.only_second}, of {comparison.total}",
        subtitle=f"A: {first.saved.name}; B: {second.saved.name}",
    )


def class_table(measured: Metrics) -> str:
    """Format counts, precision, recall and F1 of each class as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", "total", "predicted", "correct", "precision", "recall", "f1"])
    for one in measured.by_class:
        writer.writerow([one.name, one.total, one.predicted, one.correct, one.precision, one.recall, one.f1])
    return text.getvalue()


def description(evaluation: Evaluations, command: str) -> str:
    """Format the description of an evaluation's run in MLflow, as Markdown."""
    first, comparison = evaluation.first, evaluation.comparison
    lines = [
        f"### {log.percent(first.metrics.correct, first.metrics.total)}: {first.saved.source}",
        "",
        f"`{command}`",
        "",
        f"On {evaluation.pictures.name}.",
    ]
    if comparison is not None and evaluation.second is not None:
        second = evaluation.second
        lines += [
            "",
            f"Compared with {second.saved.source}: "
            f"{log.percent(second.metrics.correct, second.metrics.total)}. "
            f"Both right {comparison.both}, only the first {comparison.only_first}, only the second "
            f"{comparison.only_second}, both wrong {comparison.neither}; McNemar's exact test: "
            f"p = {comparison.p:.3g}.",
        ]
    return "\n".join(lines)
