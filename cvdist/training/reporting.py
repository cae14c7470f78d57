"""What a run's page in MLflow shows: metric names, figures, the description on top."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from cvdist import log
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import BadPicture, Loader
from cvdist.data.sampler import Share
from cvdist.results import EpochRecord, Evaluation, RidgeResult
from cvdist.seeding import generator
from cvdist.tracking.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cvdist.checkpoints.format import Progress
    from cvdist.results import Summary

FIGURES = {
    "samples": "training pictures with their labels",
    "augmentation": "what augmentation makes of them, if there is any",
    "loss": "loss of both phases by epoch",
    "accuracy": "accuracy of both phases by epoch",
    "confusion_matrix": "which class was taken for which, at the best epoch",
    "most_wrong": "the validation pictures that were wrong with most confidence",
}

FOLDERS = {
    "filters": "what the convolutions look for; `forming.gif`: how they came about",
    "activations": "what they make of a picture, before and after ReLU",
    "top_activations": "the validation pictures that activate their channels most",
    "gradcam": "which part of a picture spoke for the prediction, right and wrong ones",
}


def epoch_metrics(record: EpochRecord) -> dict[str, float]:
    """The metrics of an epoch, grouped by their prefixes."""
    return {
        "train/loss": record.train_loss,
        "train/accuracy": record.train_accuracy,
        "train/correct": record.train_correct,
        "train/total": record.train_total,
        "train/learning_rate": record.learning_rate,
        "valid/loss": record.valid_loss,
        "valid/accuracy": record.valid_accuracy,
        "valid/correct": record.valid_correct,
        "valid/total": record.valid_total,
        "speed/epoch_seconds": record.seconds,
        "speed/samples_per_second": record.samples_per_second,
        "memory/peak_mb": record.peak_memory / 2**20,
        "storage/slow_requests": record.storage_slow,
        "storage/failed_requests": record.storage_failed,
        "storage/seconds_lost": record.storage_seconds,
    }


def ridge_metrics(result: RidgeResult) -> dict[str, float]:
    """The metrics of a ridge probe."""
    return {
        "ridge/valid_accuracy": result.accuracy,
        "ridge/valid_correct": result.correct,
        "ridge/valid_total": result.total,
        "ridge/penalty": result.penalty,
        "ridge/seconds": result.seconds,
    }


def samples_figure(loader: Loader) -> Callable[[], Figure]:
    """Draws 32 training pictures, the same for every run on the data."""

    def draw() -> Figure:
        from cvdist.figures.pictures import picture_grid

        count = min(32, loader.info.train_size)
        rows = torch.randperm(loader.info.train_size, generator=generator("samples"))[:count].tolist()
        images, labels = loader.pictures("train", rows)
        return picture_grid(images, labels, title=f"{loader.info.name}: training pictures")

    return draw


def augmentation_figure(loader: Loader, augmentation: Augmentation) -> Callable[[], Figure]:
    """Draws eight training pictures as they are, and below each what three epochs make of it."""

    def draw() -> Figure:
        from cvdist.figures.pictures import picture_grid

        count, epochs = min(8, loader.info.train_size), 3
        rows = torch.randperm(loader.info.train_size, generator=generator("samples"))[:count].tolist()
        images, labels = loader.pictures("train", rows)
        share = Share(torch.tensor(rows), start=0, offset=0, global_size=count)
        shown, titles = [images], list(labels)
        for epoch in range(1, epochs + 1):
            changed = augmentation.apply(images.float(), augmentation.draw(share, epoch))
            shown.append(changed.round().clamp(0, 255).to(torch.uint8))
            titles += [f"epoch {epoch}"] * count
        title = f"{loader.info.name}: as it is, and augmented"
        return picture_grid(torch.cat(shown), titles, title=title, columns=count)

    return draw


def log_figures(tracker: Tracker, loader: Loader, progress: Progress, best: Evaluation) -> None:
    """The figures of a finished run."""

    def confusion() -> Figure:
        from cvdist.figures.confusion import confusion_matrix

        return confusion_matrix(best.confusion, loader.info.classes)

    def loss() -> Figure:
        from cvdist.figures.curves import loss_curves

        return loss_curves(progress.history)

    def accuracy() -> Figure:
        from cvdist.figures.curves import accuracy_curves

        return accuracy_curves(progress.history)

    def wrong() -> Figure:
        from cvdist.figures.pictures import wrong_grid

        classes = loader.info.classes
        images, true = loader.pictures("valid", [mistake.index for mistake in best.mistakes])
        return wrong_grid(
            images,
            true,
            [classes[mistake.predicted] for mistake in best.mistakes],
            [mistake.confidence for mistake in best.mistakes],
            title=f"Most confidently wrong ({best.total - best.correct}/{best.total} are wrong)",
            total=best.total,
        )

    tracker.log_figure("loss", loss)
    tracker.log_figure("accuracy", accuracy)
    tracker.log_figure("confusion_matrix", confusion)
    tracker.log_figure("most_wrong", wrong)


def quarantine_table(bad: Sequence[BadPicture]) -> str:
    """The pictures that were left out, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "reason"])
    writer.writerows((picture.path, picture.reason) for picture in bad)
    return text.getvalue()


def description(summary: Summary, command: str) -> str:
    """Markdown for the top of the run's page."""
    figures = "\n".join(f"- `figures/{name}.png`: {what}" for name, what in FIGURES.items())
    figures += "".join(f"\n- `figures/{name}/`: {what}" for name, what in FOLDERS.items() if summary.visualized)
    baseline = f"\nBaseline, a ridge probe on the same features: {summary.ridge}.\n" if summary.ridge else ""
    return f"""### {log.percent(summary.best_correct, summary.valid_total)} at epoch {summary.best_epoch}

`{command}`

{summary.model} on {summary.data}; {summary.epochs} epochs on {summary.workers} workers \
({summary.hardware}), {summary.samples_per_second:,.0f} samples/s, {log.duration(summary.train_seconds)}.
{baseline}
Artifacts:
- `report.html`: all of this on one page, to send to others
{figures}

The model of the best epoch takes uint8 pictures (n, C, H, W) and returns probabilities.
"""
