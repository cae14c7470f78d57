"""Fits a head on cached features by logistic regression: a linear one in place of epochs, others after them.

A head with hidden layers can compute any linear function of its inputs: two of its hidden units for each class
are the score and its negative, and ReLU(x) - ReLU(-x) = x.
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cvdist import log
from cvdist.distributed.collectives import annotate_collective_errors
from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import UserError
from cvdist.features.loader import FeatureLoader
from cvdist.hardware import available_memory
from cvdist.results import LogisticResult
from cvdist.training import logistic, reporting
from cvdist.training.logistic import Part
from cvdist.training.progress import TrainedEpoch
from cvdist.training.run import Run

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.25  # of the free memory that a node's workers together may keep standardized features in
_PART = 2**24  # numbers that are read from the cache at a time
_PART_ROWS = 4096


def linear_layer(trained: nn.Module) -> nn.Linear | None:
    """Return the linear layer that has all parameters of `trained`; None if there is no such layer."""
    layers = _with_parameters(trained)
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def head_of(trained: nn.Module, classes: int) -> nn.Module | None:
    """Return the part of `trained` that has all its parameters and can compute any linear function.

    Returns:
        A linear layer; or an `nn.Sequential` of linear layers, ReLU and dropout. None if there is no such part,
        or its hidden layers have fewer than two units for each class.
    """
    if layer := linear_layer(trained):
        return layer
    owners = _with_parameters(trained)
    for module in trained.modules():
        layers = _linear(module)
        if layers and layers == owners and layers[-1].out_features == classes:
            kinds = {type(child) for child in module.children()}
            wide = all(layer.out_features >= 2 * classes for layer in layers[:-1])
            return module if wide and kinds <= {nn.Linear, nn.ReLU, nn.Dropout} else None
    return None


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.children() if isinstance(layer, nn.Linear)]


def assign(head: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Have a head (`head_of`) compute the scores of a linear layer, up to rounding, when it is evaluated.

    Args:
        head: The head. Hidden units that are not needed keep their weights, and count for nothing.
        weight: Weights of the linear layer, (classes, inputs).
        bias: Its biases, (classes,).
    """
    layers = [head] if isinstance(head, nn.Linear) else _linear(head)
    if len(layers) == 1:
        layers[0].weight.copy_(weight)
        layers[0].bias.copy_(bias)
        return
    classes, units = len(bias), 2 * len(bias)
    first, *middle, last = layers
    first.weight[:units].copy_(torch.cat([weight, -weight]))
    first.bias[:units].copy_(torch.cat([bias, -bias]))
    for layer in middle:  # ReLU does not change values that are not negative
        layer.weight[:units].zero_()[:, :units].fill_diagonal_(1)
        layer.bias[:units].zero_()
    last.weight.zero_()
    last.weight[:, :classes].fill_diagonal_(1)
    last.weight[:, classes:units].fill_diagonal_(-1)
    last.bias.zero_()


def require_linear(run: Run) -> None:
    """Refuse `--fit logistic` for what it can't train.

    Raises:
        UserError: On all workers.
    """
    cached = isinstance(run.loader, FeatureLoader)
    if run.config.loop.fit == "logistic" and not (cached and linear_layer(run.trained)):
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
    class_weights: Tensor | None = None,
    after_pass: Callable[[str, int], None],
) -> logistic.Fit:
    """Solve for a linear function of what the head of `trained` reads, which it leaves as it is.

    All workers must call this, and all get the same.

    Args:
        loader: The features.
        trained: What reads them, with a head that can compute the function (`head_of`) and may have no values.
        device: Where to compute.
        rank: This worker's rank.
        world_size: Number of workers.
        workers_on_node: Number of workers that share this node's memory.
        seed: Seed of the choice of held-out pictures.
        class_weights: As in `logistic.fit`.
        after_pass: As in `logistic.fit`.
    """
    classes = len(loader.info.classes)
    head = head_of(trained, classes)
    assert head is not None
    first = head if isinstance(head, nn.Linear) else _linear(head)[0]
    before = inputs_of(trained, head)
    size = max(min(_PART // max(loader.feature_size, 1), _PART_ROWS), 1)

    def passes() -> Iterator[Part]:
        for view in range(loader.views):
            for batch in loader.batches_in_order("train", rank, world_size, size, view):
                yield Part(before(batch.images), batch.labels, batch.indices.to(device), first=view == 0)

    return logistic.fit(
        passes,
        loader.labels("train"),
        classes,
        first.in_features,
        rank=rank,
        device=device,
        seed=seed,
        memory=_MEMORY_SHARE * available_memory(device) / workers_on_node,
        class_weights=class_weights,
        after_pass=after_pass,
    )


def inputs_of(trained: nn.Module, head: nn.Module | None = None) -> nn.Module:
    """Return a copy of `trained` that computes what its head, or its linear layer, reads."""
    return copy.deepcopy(trained, memo={id(head or linear_layer(trained)): nn.Identity()}).eval()


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
            reporting.first_step_done(run)
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
            class_weights=run.class_weights,
            after_pass=after_pass,
        )
        run.line.clear()
        for module in (run.trained, run.ema.module if run.ema is not None else None):
            head = head_of(module, len(found.bias)) if module is not None else None
            if head is not None:
                assign(head, found.weight, found.bias)
    run.optimizer.state.clear()  # momenta of other weights
    seconds = time.monotonic() - began
    run.progress.logistic = LogisticResult(
        epoch, found.penalty, found.folds, found.path, seconds, run.info.multilabel
    )
    if run.main:
        logger.info("fit        logistic regression, %s", run.progress.logistic)
    samples = run.info.train_size * loader.views * found.passes
    return TrainedEpoch(found.loss, found.correct, 0.0, samples / max(seconds, 1e-9))


def wanted(run: Run) -> bool:
    """Return whether the head must still be fitted: by `--fit`, or because epochs ended below the baseline."""
    baseline, best = run.progress.ridge, run.best
    if run.progress.logistic is not None or run.config.loop.fit == "logistic":
        return run.progress.logistic is None
    if baseline is None or best is None or run.mode.name == "head":
        return False  # there is no baseline for pictures, and each worker has a part of a split head
    if run.config.loop.select_by != baseline.select_by:
        return False  # the baseline has no other value
    if head_of(run.trained, len(run.info.classes)) is None:
        return False
    reached = best.labels.mean_average_precision if best.labels else best.correct / best.total
    if reached < baseline.value and run.main:
        shown = [f"mAP {value:.4f}" for value in (baseline.value, reached)]
        if not best.labels:
            shown = [log.percent(one.correct, one.total) for one in (baseline, best)]
        logger.info("baseline   %s is above the best epoch, %s: the head is fitted as well", *shown)
    return reached < baseline.value
