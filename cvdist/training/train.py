"""The training loop, the same under every runtime and for any number of workers.

It reads from top to bottom: `train` runs the epochs, `train_epoch` the steps of one epoch, and `train_step` one
step. All that they need is in a `Run`, which `cvdist.training.setup.build_run` makes. How a step is divided
over the workers is decided in `cvdist.parallel`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cvdist.data.dataset import Batch
from cvdist.distributed.collectives import annotate_collective_errors
from cvdist.distributed.stop_request import StopRequest
from cvdist.results import Summary
from cvdist.training import (
    backbone,
    checkpointing,
    compiling,
    early_stopping,
    ema,
    imbalance,
    logistic_head,
    memory,
    reporting,
    ridge,
)
from cvdist.training.loss import loss_sum
from cvdist.training.meter import Meter
from cvdist.training.optimizer import set_learning_rate
from cvdist.training.progress import TrainedEpoch, record_epoch, show_progress
from cvdist.training.run import Run
from cvdist.training.validation import validate


def train(run: Run) -> Summary:
    """Train until all epochs are done or none is better any more, then log the best model.

    All workers must call this.

    A restored run continues at the sample where its checkpoint was saved.

    Raises:
        UserError: On all workers, if the training diverges or a checkpoint can't be stored.
        SystemExit: If the run is asked to end, after a checkpoint.
    """
    reporting.announce(run)
    reporting.log_data(run)
    fresh = not (run.progress.epoch or run.progress.position)
    run.visualizer.start(run.evaluated_model(), fresh=fresh)
    if run.adopted and run.progress.history and not run.progress.position:
        # The other run's epoch may stay the best, and the best model is read from this run's own checkpoints.
        checkpointing.save(run)
    ridge.fit_baseline(run)
    reporting.log_history(run)
    if run.config.loop.fit == "epochs":
        while run.progress.epoch < run.config.loop.epochs and not early_stopping.due(run):
            run_epoch(run, run.progress.epoch + 1, train_epoch)
    if logistic_head.wanted(run):
        run_epoch(run, run.progress.epoch + 1, logistic_head.fit)
    run.worker.wait_for_uploads()
    if run.main:
        reporting.log_results(run, checkpointing.best_model(run))
    return reporting.summarize(run)


def run_epoch(run: Run, epoch: int, train: Callable[[Run, int], TrainedEpoch]) -> None:
    """Train as an epoch does, validate, and save. All workers must call this.

    Args:
        run: The run.
        epoch: The epoch, counted from 1.
        train: Trains the model in this epoch.
    """
    began = time.monotonic()
    with memory.explain_full_memory(run.worker.device, memory.advice(run.config)):
        trained = train(run, epoch)
    with memory.explain_full_memory(run.worker.device, memory.validation_advice(run.config)):
        evaluation = validate(run)
    record = record_epoch(run, epoch, trained, evaluation, time.monotonic() - began)
    reporting.show_epoch(run, record)
    run.visualizer.epoch_done(run.evaluated_model(), epoch)
    checkpointing.save(run)
    run.tracker.log_metrics(reporting.epoch_metrics(record), epoch)
    reporting.log_logistic(run)


def train_epoch(run: Run, epoch: int) -> TrainedEpoch:
    """Train on the samples of one epoch, or on those that a restored one still lacks. `epoch` counts from 1."""
    config, worker, progress, mode = run.config, run.worker, run.progress, run.mode
    if not progress.position:
        progress.shuffle = run.loader.shuffle(mode.world_size, balanced=config.loop.balanced_sampling)
    order = run.loader.epoch_order(config.loop.batch_size, config.run.seed, epoch, progress.shuffle)
    steps = order.steps()
    step = steps - order.steps(progress.position)
    save_every, log_every = config.checkpoint.every, config.loop.log_every_steps
    mode.align()
    backbone.begin_epoch(run, epoch)
    meter = Meter(worker.device, mode.traffic, multilabel=run.info.multilabel)
    began, began_at, rate = time.monotonic(), progress.position, 0.0
    batches = run.loader.train_batches(order, mode.rank, mode.world_size, progress.position)
    weights = imbalance.batch_weights(
        None if run.info.multilabel else run.class_weights, run.labels, order, progress.position
    )
    for batch, weight in zip(meter.timed(batches), weights, strict=True):
        rate = run.schedule(epoch - 1 + progress.position / run.info.train_size)
        with annotate_collective_errors(worker.rank, epoch, step + 1):
            train_step(run, batch, rate, meter, weight)
            step += 1
            progress.position += batch.global_size
            if not run.first_step_at:
                reporting.first_step_done(run)
            request = worker.poll_stop_request()
        save_now = bool(request) or (save_every > 0 and step % save_every == 0)
        if save_now or step % log_every == 0 or step == steps:
            # The device is read here and not in each step. A broken loss ends the run before it can be saved.
            stats = meter.take()
            run.losses.require_finite(stats.loss, epoch, step)
            progress.loss_sum += stats.loss
            progress.correct += stats.correct
            reporting.log_steps(run, stats, (epoch - 1) * steps + step, rate)
        if save_now and step < steps:
            checkpointing.save(run, step=step)
            if request is StopRequest.EXIT:
                checkpointing.exit_when_stored(run)
        if run.line.due():
            speed = (progress.position - began_at) / (time.monotonic() - began)
            show_progress(run, epoch, step, steps, speed, meter)
    run.line.clear()
    speed = (progress.position - began_at) / max(time.monotonic() - began, 1e-9)
    return TrainedEpoch(progress.loss_sum / run.info.train_size, progress.correct, rate, speed)


def train_step(run: Run, batch: Batch, rate: float, meter: Meter, weight: float) -> None:
    """Take one optimizer step. Nothing here waits for the device.

    Args:
        run: The run.
        batch: This worker's n samples of a global batch. n may be 0, and then the worker only takes part in the
            exchanges with the others.
        rate: The learning rate.
        meter: Counts losses and correct predictions.
        weight: The sum of the samples' weights in the global batch; their number if all of them weigh the same.
    """
    mode, settings = run.mode, run.config.loop
    compiling.begin_step(run.config.loop.compile)
    set_learning_rate(run.optimizer, rate)
    losses: list[Tensor] = []
    for last, images, labels in micro_batches(batch, run.config.loop.accumulate_steps, mode.world_size):
        with mode.micro_batch(last=last):  # the last one exchanges the gradients
            scores = forward(run, images).float()  # (m, classes)
            loss = loss_sum(
                scores,
                labels,
                multilabel=run.info.multilabel,
                weights=run.loss_weights,
                smoothing=settings.label_smoothing,
            )
            # The gradient has to be that of the weighted mean over the global batch. Local batches may differ
            # in size, and the exchange divides by the number of workers, not by the samples' weights. Of binary
            # cross-entropy it is that of the sum over the classes, which is as large as that of cross-entropy,
            # so that learning rates mean the same.
            added = scores.shape[1] if run.info.multilabel else 1
            run.scaler.scale(loss * (mode.world_size * added / weight)).backward()
        if mode.counts:
            meter.add(loss.detach(), scores.detach(), labels)
        losses.append(loss.detach())
    if settings.clip_grad_norm:
        run.scaler.unscale_(run.optimizer)
        mode.clip(dict(run.trained.named_parameters()), settings.clip_grad_norm)
    run.losses.add(sum(losses[1:], losses[0]), batch.indices)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        ema.update(run.ema, run.trained, settings.model_ema_decay)


def forward(run: Run, images: Tensor) -> Tensor:
    """Compute scores (m, classes) from normalized pictures (m, C, H, W), or from cached features (m, ...)."""
    with run.precision.autocast():
        if run.frozen is not None:
            with torch.no_grad():
                images = run.frozen(images)
        scores: Tensor = run.mode.replica(images)
    return scores


def micro_batches(batch: Batch, count: int, world_size: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Cut a local batch into `count` micro-batches of about equal size, or fewer if it has fewer samples.

    All workers get the same number of micro-batches, and at least one, which may be empty.

    Yields:
        Whether it is the last one, images (m, ...), and labels int64 (m,), or shares of the classes.
    """
    count = max(1, min(count, batch.global_size // world_size))
    if count == 1:
        yield True, batch.images, batch.labels
        return
    cut = zip(batch.images.tensor_split(count), batch.labels.tensor_split(count), strict=True)
    for number, (images, labels) in enumerate(cut, start=1):
        yield number == count, images, labels
