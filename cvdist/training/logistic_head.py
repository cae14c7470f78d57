"""Fits a linear head on cached features by logistic regression, in place of epochs."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from cvdist import log
from cvdist.distributed.collectives import annotate_collective_errors, set_group_timeout
from cvdist.distributed.consensus import StopRequest
from cvdist.errors import UserError
from cvdist.features.loader import FeatureLoader
from cvdist.hardware import available_memory
from cvdist.results import LogisticResult
from cvdist.training import logistic
from cvdist.training.logistic import Part
from cvdist.training.progress import TrainedEpoch
from cvdist.training.run import Run

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.25  # of the free memory that a node's workers together may keep standardized features in
_PART = 2**24  # numbers that are read from the cache at a time
_PART_ROWS = 4096


def linear_layer(trained: nn.Module) -> nn.Linear | None:
    """Return the linear layer that has all parameters of `trained`; None if there is no such layer."""
    layers = [layer for layer in trained.modules() if next(layer.parameters(recurse=False), None) is not None]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def can_fit(run: Run) -> bool:
    """Return whether logistic regression can train what the run trains: one linear layer on cached features."""
    return isinstance(run.loader, FeatureLoader) and linear_layer(run.trained) is not None


def require_linear(run: Run) -> None:
    """Refuse `--fit logistic` for what it can't train.

    Raises:
        UserError: On all workers.
    """
    if run.config.loop.fit == "logistic" and not can_fit(run):
        raise UserError(
            f"--fit logistic solves for one linear layer on cached features, and {run.identity} trains more: "
            "choose --head linear and train no stage of the backbone, or --fit epochs",
            on_all_workers=True,
        )


def solve(
    loader: FeatureLoader,
    trained: nn.Module,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers_on_node: int = 1,
    seed: int,
    after_pass: Callable[[str, int], None],
) -> logistic.Fit:
    """Solve for the linear layer of `trained` on cached features, which it leaves as it is.

    All workers must call this, and all get the same.

    Args:
        loader: The features.
        trained: What reads them; all its parameters are those of one linear layer, which may have no values.
        device: Where to compute.
        rank: This worker's rank.
        world_size: Number of workers.
        workers_on_node: Number of workers that share this node's memory.
        seed: Seed of the choice of held-out pictures.
        after_pass: As in `logistic.fit`.
    """
    layer = linear_layer(trained)
    assert layer is not None
    before = inputs_of(trained)
    size = max(min(_PART // max(loader.feature_size, 1), _PART_ROWS), 1)

    def passes() -> Iterator[Part]:
        for view in range(loader.views):
            for batch in loader.batches_in_order("train", rank, world_size, size, view):
                yield Part(before(batch.images), batch.labels, batch.indices.to(device), first=view == 0)

    return logistic.fit(
        passes,
        loader.labels("train"),
        len(loader.info.classes),
        layer.in_features,
        rank=rank,
        device=device,
        seed=seed,
        memory=_MEMORY_SHARE * available_memory(device) / workers_on_node,
        after_pass=after_pass,
    )


def inputs_of(trained: nn.Module) -> nn.Module:
    """Return a copy of `trained` that computes what its linear layer reads."""
    return copy.deepcopy(trained, memo={id(linear_layer(trained)): nn.Identity()}).eval()


def fit(run: Run, epoch: int) -> TrainedEpoch:
    """Give the head the weights of logistic regression. All workers must call this.

    Nothing is kept before the end, so a fit that is stopped begins again.

    Args:
        run: The run.
        epoch: The epoch that the fit counts as, from 1.

    Raises:
        SystemExit: If the run is asked to end.
    """
    loader, worker = run.loader, run.worker
    assert isinstance(loader, FeatureLoader)
    began = time.monotonic()

    def after_pass(doing: str, count: int) -> None:
        if not run.first_step_at:
            run.first_step_at = time.time()
            set_group_timeout(run.config.runtime.step_timeout)
        if worker.poll_stop_request() is StopRequest.EXIT:
            worker.wait_for_uploads()
            if run.main:
                logger.info("stopped by SIGTERM: --name %s begins the fit again", run.config.run.name)
            sys.exit(128 + signal.SIGTERM)
        if run.line.due():
            run.line.show(f"logistic regression: {doing}, {count} passes over the features")

    with torch.no_grad(), annotate_collective_errors(worker.rank, epoch, 1):
        found = solve(
            loader,
            run.trained,
            worker.device,
            rank=worker.rank,
            world_size=worker.world_size,
            workers_on_node=worker.local_world_size,
            seed=run.config.run.seed,
            after_pass=after_pass,
        )
        run.line.clear()
        for module in (run.trained, run.ema.module if run.ema is not None else None):
            target = linear_layer(module) if module is not None else None
            if target is not None:
                target.weight.copy_(found.weight)
                target.bias.copy_(found.bias)
    run.optimizer.state.clear()  # momenta of other weights
    seconds = time.monotonic() - began
    run.progress.logistic = LogisticResult(epoch, found.penalty, found.folds, found.path, seconds)
    if run.main:
        logger.info("fit        logistic regression, %s", run.progress.logistic)
    samples = run.info.train_size * loader.views * found.passes
    return TrainedEpoch(found.loss, found.correct, 0.0, samples / max(seconds, 1e-9))


def wanted(run: Run) -> bool:
    """Return whether the head is yet to be fitted: by `--fit`, or since epochs ended below the baseline."""
    if run.progress.logistic is not None or not can_fit(run):
        return False
    baseline, best = run.progress.ridge, run.best
    if run.config.loop.fit == "logistic" or baseline is None or best is None:
        return run.config.loop.fit == "logistic"
    if best.correct < baseline.correct and run.main:
        shown = (log.percent(one.correct, one.total) for one in (baseline, best))
        logger.info("baseline   %s is above the best epoch, %s: the head is fitted as well", *shown)
    return best.correct < baseline.correct
