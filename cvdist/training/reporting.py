"""Reports on a run: lines in the log, and parameters, metrics, figures and the model in MLflow."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Sequence

from torch import nn

from cvdist import log, models, slow_requests, startup
from cvdist.data.quarantine import QUARANTINE, quarantine_csv
from cvdist.data.sampler import EpochOrder, partition
from cvdist.distributed.collectives import gather, set_group_timeout
from cvdist.distributed.device import describe
from cvdist.results import EpochRecord, LabelResults, RidgeResult, Summary, by_class, correct_of
from cvdist.training import early_stopping, imbalance, run_figures
from cvdist.training.meter import StepStats
from cvdist.training.run import Run

logger = logging.getLogger(__name__)

_REMEMBERED = 500  # step metrics that a checkpoint keeps, to be logged again after a crash


def first_step_done(run: Run) -> None:
    """Log how long each phase of the start took. All workers must call this, after their first step."""
    run.first_step_at = time.time()
    set_group_timeout(run.config.runtime.step_timeout)  # the slow work of the first step is done
    run.start.end("first step")
    workers = gather(run.start.phases)
    if run.main:
        again = f", after restart {run.start.attempt - 1}" if run.start.attempt > 1 else ""
        logger.info("start      %s%s", startup.describe(workers), again)
    slowest = {phase: max(one.get(phase, 0.0) for one in workers) for phase in run.start.phases}
    names = {f"start/{phase.replace(' ', '_')}_seconds": seconds for phase, seconds in slowest.items()}
    run.tracker.log_metrics(names, run.start.attempt)


def announce(run: Run) -> None:
    """Log the model, the data and the settings of the run. Only rank 0 does so."""
    if not run.main:
        return
    config, worker = run.config, run.worker
    hardware = describe(worker.device)
    origin = models.origin(run.model)
    batch, count = config.loop.batch_size, run.mode.world_size
    sizes = [len(partition(batch, rank, count)) for rank in range(count)]
    each = str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    steps = EpochOrder(run.info.train_size, batch, seed=0, epoch=0).steps()
    logger.info("data       %s", run.info)
    logger.info("classes    %s", imbalance.describe(run.info.classes, run.labels))
    if warning := imbalance.warning(config.loop, run.info.classes, run.labels):
        logger.warning("imbalance  %s", warning)
    if run.class_weights is not None:
        least, most = run.class_weights.aminmax()
        logger.info("           weigh %.3g to %.3g in the loss (--class-weights)", least, most)
    if run.info.multilabel:
        logger.info("           a picture may have several: sigmoid, binary cross-entropy")
    if run.loader.note:
        logger.info("features   %s", run.loader.note)
    frozen = f", {run.frozen_parameters:,} frozen" if run.frozen_parameters else ""
    logger.info("model      %s, %s trained parameters%s", run.identity, f"{run.trained_parameters:,}", frozen)
    if origin is not None:
        sha = origin.digest[:16]
        normalization = origin.preprocessing.name or f"{origin.preprocessing.mean}, {origin.preprocessing.std}"
        logger.info("weights    %s, normalization %s, sha256 %s", origin.source, normalization, sha)
        if origin.note:
            logger.info("           %s", origin.note)
    logger.info("workers    %d on %s", worker.world_size, hardware)
    logger.info("parallel   %s", run.plan.note)
    layout = "channels_last" if config.loop.channels_last else "contiguous"
    logger.info("precision  %s, %s (%s)", run.precision.name, layout, run.precision.reason)
    if config.loop.fit == "logistic":
        logger.info("fit        logistic regression to its optimum; if it is stopped, it begins again")
    else:
        logger.info(
            "batch      %d = %s on each of %d worker%s; %d steps an epoch, %d epochs",
            *(batch, each, worker.world_size, "s" if worker.world_size > 1 else "", steps, config.loop.epochs),
        )
    if run.resumed_at:
        logger.info("resuming   at %s, %d epochs done", run.resumed_at, run.progress.epoch)
        if run.changed:
            logger.info("           other than in the checkpoint: %s", run.changed)
    run.tracker.log_params(
        {
            "run.world_size": worker.world_size,
            "run.hardware": hardware,
            "run.precision": run.precision.name,
            "run.parallel": run.mode.name,
            "run.select_by": config.loop.select_by,
            "run.parameters": run.trained_parameters,
            "run.frozen_parameters": run.frozen_parameters,
            "weights.sha256": origin.digest if origin else "",
            "weights.normalization": origin.preprocessing.name if origin else "",
            "data.classes": len(run.info.classes),
            "data.mean": run.info.mean,
            "data.std": run.info.std,
        }
    )


def log_data(run: Run) -> None:
    """Log the data set, the pictures that were left out, and what training pictures look like."""
    tracker, loader = run.tracker, run.loader
    tracker.log_dataset(loader.info, loader.digest)
    if loader.quarantine:
        tracker.log_text(QUARANTINE, quarantine_csv(loader.quarantine))
    tracker.log_figure("samples", run_figures.samples(loader))
    if loader.augmentation is not None or loader.mixing is not None:
        tracker.log_figure("augmentation", run_figures.augmentation(loader))


def log_history(run: Run) -> None:
    """Log the metrics that the checkpoint remembers, because a killed attempt may not have delivered them.

    The tracker leaves out those that MLflow has already.
    """
    for step, values in run.progress.logged:
        run.tracker.log_metrics(values, step)
    for record in run.progress.history:
        run.tracker.log_metrics(epoch_metrics(record), record.epoch)
    log_logistic(run)


def log_logistic(run: Run) -> None:
    """Log the result of each penalty of logistic regression on held-out pictures, if that fitted the head."""
    for number, held in enumerate(run.progress.logistic.path if run.progress.logistic else (), start=1):
        values = {
            "logistic/penalty": held.penalty,
            "logistic/held_out_loss": held.loss,
            "logistic/held_out_accuracy": held.accuracy,
            "logistic/held_out_correct": held.correct,
            "logistic/held_out_total": held.total,
            "logistic/passes": held.passes,
        }
        run.tracker.log_metrics(values, number)


def log_steps(run: Run, stats: StepStats, step: int, rate: float) -> None:
    """Log the metrics of the steps since the last call.

    Args:
        run: The run.
        stats: What these steps measured.
        step: The last of them, counted from 1 over the whole run.
        rate: Its learning rate.
    """
    seconds = stats.seconds / stats.steps
    values = {
        "step/loss": stats.loss / stats.count,
        "step/accuracy": stats.correct / stats.count,
        "step/correct": stats.correct,
        "step/total": stats.count,
        "step/learning_rate": rate,
        "step/samples_per_second": stats.count / stats.seconds,
        "step/seconds": seconds,
        "step/data_seconds": stats.data_seconds,
        "step/compute_seconds": stats.compute_seconds,
        "step/communication_seconds": stats.communication_seconds,
        "step/bytes_sent": stats.bytes_sent,
        "step/roofline_fraction": run.plan.min_step_seconds(round(stats.count / stats.steps)) / seconds,
    }
    run.tracker.log_metrics(values, step=step)
    run.progress.logged = [*run.progress.logged[1 - _REMEMBERED :], (step, values)]


def show_epoch(run: Run, record: EpochRecord) -> None:
    """Write the line of an epoch that has just ended to the log."""
    if run.main:
        fitted = run.progress.logistic is not None and run.progress.logistic.epoch == record.epoch
        precision, several = record.valid_mean_average_precision, run.info.multilabel
        found = [
            correct_of(record.valid_correct, record.valid_total, several=several),
            by_class(record.valid_balanced_accuracy, record.valid_macro_f1, precision),
        ]
        logger.info(
            "%s  train loss %.4f, %s  valid loss %.4f, %s%s  %s, %s samples/s",
            "fitted   " if fitted else f"epoch {record.epoch}/{run.config.loop.epochs}",
            record.train_loss,
            correct_of(record.train_correct, record.train_total, several=several),
            record.valid_loss,
            ", ".join(reversed(found) if several else found),
            " (best)" if run.progress.best_epoch == record.epoch else "",
            log.duration(record.seconds),
            f"{record.samples_per_second:,.0f}",
        )


def log_results(run: Run, model: nn.Module) -> None:
    """Log the figures of a finished run and its best model. Only rank 0 calls this."""
    best, best_epoch = run.best, run.progress.best_epoch
    assert best is not None
    for name, draw in run_figures.results(run.loader, run.progress.history, best).items():
        run.tracker.log_figure(name, draw)
    if run.progress.logistic is not None and run.progress.logistic.path:
        run.tracker.log_figure("penalties", run_figures.penalties(run.progress.logistic))
    example, _ = run.loader.pictures("valid", range(min(4, run.info.valid_size)))
    thresholds = best.labels.thresholds.tolist() if best.labels else []
    if best.labels:
        run.tracker.log_text("classes.csv", classes_csv(run.info.classes, best.labels))
    about = (run.identity, run.normalization, run.precision.name)
    run.tracker.log_model(model, *about, example, step=best_epoch, thresholds=thresholds)
    run.visualizer.finish(run, model)


def summarize(run: Run) -> Summary:
    """Return what a finished run reports to the person who started it."""
    history, best = run.progress.history, run.progress.best
    lost = slow_requests.take()  # since the last epoch
    assert best is not None
    return Summary(
        data=str(run.info),
        model=str(run.identity),
        workers=run.worker.world_size,
        hardware=describe(run.worker.device),
        epochs=run.progress.epoch,
        best=best,
        stopped=early_stopping.reason(run.progress, run.config.loop),
        samples_per_second=sum(record.samples_per_second for record in history) / len(history),
        train_seconds=run.progress.seconds,
        first_step_at=run.first_step_at,
        visualized=run.visualizer.enabled,
        slow_requests=sum(record.slow_requests for record in history) + len(lost),
        seconds_lost=sum(record.seconds_lost for record in history) + sum(lost),
        ridge=run.progress.ridge,
        logistic=run.progress.logistic,
    )


def epoch_metrics(record: EpochRecord) -> dict[str, float]:
    """Return the metrics of an epoch, whose names begin with their group."""
    return {
        "train/loss": record.train_loss,
        "train/accuracy": record.train_accuracy,
        "train/correct": record.train_correct,
        "train/total": record.train_total,
        "train/learning_rate": record.learning_rate,
        "valid/loss": record.valid_loss,
        "valid/accuracy": record.valid_accuracy,
        **(
            {"valid/balanced_accuracy": record.valid_balanced_accuracy}
            if record.valid_mean_average_precision is None
            else {"valid/mean_average_precision": record.valid_mean_average_precision}
        ),
        "valid/macro_f1": record.valid_macro_f1,
        "valid/correct": record.valid_correct,
        "valid/total": record.valid_total,
        "speed/epoch_seconds": record.seconds,
        "speed/samples_per_second": record.samples_per_second,
        "memory/peak_mb": record.peak_memory / 2**20,
        "storage/slow_requests": record.slow_requests,
        "storage/seconds_lost": record.seconds_lost,
    }


def classes_csv(classes: Sequence[str], found: LabelResults) -> str:
    """Return a table with a line for each class: how well it is recognized, and its threshold."""
    counts = found.counts
    columns = {
        "pictures": counts.true,
        "average_precision": found.average_precision,
        "threshold": found.thresholds,
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *columns])
    for name, *values in zip(classes, *(column.tolist() for column in columns.values()), strict=True):
        writer.writerow([name, *("" if math.isnan(value) else f"{value:.6g}" for value in values)])
    return text.getvalue()


def ridge_metrics(result: RidgeResult) -> dict[str, float]:
    """Return the metrics of a ridge probe."""
    precision = result.mean_average_precision
    return {
        **({} if precision is None else {"ridge/valid_mean_average_precision": precision}),
        "ridge/valid_accuracy": result.accuracy,
        "ridge/valid_correct": result.correct,
        "ridge/valid_total": result.total,
        "ridge/penalty": result.penalty,
        "ridge/seconds": result.seconds,
    }


def description(summary: Summary, command: str) -> str:
    """Return Markdown for the top of the run's page in MLflow.

    Args:
        summary: The results of the run.
        command: The command that started it.
    """
    drawn = run_figures.names(multilabel=summary.multilabel)
    figures = "\n".join(f"- `figures/{name}.png`: {what}" for name, what in drawn.items())
    if summary.visualized:
        figures += "".join(f"\n- `figures/{name}/`: {what}" for name, what in run_figures.FOLDERS.items())
    baseline = f"\nBaseline, a ridge probe on the same features: {summary.ridge}.\n" if summary.ridge else ""
    if summary.logistic:
        baseline += f"\nLogistic regression: {summary.logistic}.\n"
    if summary.stopped:
        baseline += f"\nThe training {summary.stopped}.\n"
    if summary.below_baseline:
        baseline += f"\nNote: {summary.below_baseline}.\n"
    return f"""### {summary.outcome}

`{command}`

{summary.model} on {summary.data}; {summary.epochs} epochs on {summary.workers} workers \
({summary.hardware}), {summary.samples_per_second:,.0f} samples/s, {log.duration(summary.train_seconds)}.

{summary.by_class[:1].upper()}{summary.by_class[1:]}.
{baseline}
Artifacts:
- `report.html`: all of this on one page, to send to others
{"- `classes.csv`: average precision and threshold of each class" + chr(10) if summary.multilabel else ""}\
{figures}

The model of the best epoch takes uint8 pictures (n, C, H, W) and returns probabilities.
"""
