"""How far a run has come: the records of its epochs, and the line on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from cvdist import log, slow_requests
from cvdist.distributed.collectives import gather
from cvdist.distributed.device import peak_memory
from cvdist.results import EpochRecord, Evaluation, balanced_accuracy, macro_f1
from cvdist.training.meter import Meter
from cvdist.training.run import Run


@dataclass(frozen=True)
class TrainedEpoch:
    """Measurements of the training of one epoch, over all workers.

    Attributes:
        loss: Mean loss.
        correct: Number of correct predictions.
        learning_rate: The learning rate of the epoch's last step.
        samples_per_second: Samples a second, since the epoch began or was resumed.
    """

    loss: float
    correct: int
    learning_rate: float
    samples_per_second: float


def record_epoch(
    run: Run, epoch: int, trained: TrainedEpoch, evaluation: Evaluation, seconds: float
) -> EpochRecord:
    """Note that an epoch is done, and return its results. All workers must call this.

    Args:
        run: The run, whose progress then stands at the beginning of the next epoch.
        epoch: The epoch, counted from 1.
        trained: The measurements of its training.
        evaluation: The results on the validation data.
        seconds: How long training and validation took.
    """
    labels, confusion = evaluation.labels, evaluation.confusion
    balanced = 0.0 if confusion is None else balanced_accuracy(confusion)
    f1 = labels.counts.macro_f1 if labels else 0.0 if confusion is None else macro_f1(confusion)
    lost = [seconds for worker in gather(slow_requests.take()) for seconds in worker]
    record = EpochRecord(
        epoch=epoch,
        train_loss=trained.loss,
        train_correct=trained.correct,
        train_total=run.info.train_size,
        valid_loss=evaluation.loss,
        valid_correct=evaluation.correct,
        valid_total=evaluation.total,
        learning_rate=trained.learning_rate,
        seconds=seconds,
        samples_per_second=trained.samples_per_second,
        peak_memory=peak_memory(run.worker.device),
        slow_requests=len(lost),
        seconds_lost=sum(lost),
        valid_balanced_accuracy=balanced,
        valid_macro_f1=f1,
        select_by=run.config.loop.select_by,
        valid_mean_average_precision=labels.mean_average_precision if labels else None,
    )
    progress = run.progress
    progress.thresholds = tuple(labels.thresholds.tolist()) if labels else ()
    if progress.best is None or record.score > progress.best.score:
        progress.best_epoch, run.best = epoch, evaluation
    progress.history.append(record)
    progress.epoch, progress.position = epoch, 0
    progress.loss_sum, progress.correct = 0.0, 0
    progress.seconds += seconds
    return record


def show_progress(run: Run, epoch: int, step: int, steps: int, rate: float, meter: Meter) -> None:
    """Show on the progress line how far the epoch has come, and how long the run will take.

    Args:
        run: The run.
        epoch: The epoch, counted from 1.
        step: The number of steps done in this epoch.
        steps: The number of steps in an epoch.
        rate: Samples a second.
        meter: Knows the epoch's loss and accuracy so far. The device is read, a few times a second at most.
    """
    loop, (loss, accuracy) = run.config.loop, meter.so_far()
    left = (steps - step) * loop.batch_size + (loop.epochs - epoch) * run.info.train_size
    right = "exact matches" if run.info.multilabel else "accuracy"
    run.line.show(
        f"epoch {epoch}/{loop.epochs}  step {step}/{steps}  {log.duration(left / rate)} left  loss {loss:.4f}  "
        f"{right} {accuracy:.1%}  {rate:,.0f} samples/s",
        done=step / steps,
    )
