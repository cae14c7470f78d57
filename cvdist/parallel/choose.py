"""Which of the two ways a run takes, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import nn

from cvdist.config import TrainConfig
from cvdist.data.dataset import Loader
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.precision import Arithmetic
from cvdist.distributed.worker import Worker
from cvdist.errors import UserError
from cvdist.models.parts import Parts
from cvdist.parallel import cost, measure
from cvdist.parallel.cost import Cost, Machine, Work
from cvdist.parallel.head import linear_layers
from cvdist.parallel.modes import CLASSIFIER, DataParallel, Mode, SplitHead, powersgd_bytes

logger = logging.getLogger(__name__)

_WORTH = 1.1  # `auto` splits a head that is faster by a tenth: below that, the plainer way


@dataclass(frozen=True)
class ParallelPlan:
    """The mode of a run, and what is known of its steps.

    note: one line that says what was chosen and why. floor: seconds that a step of this worker takes at least,
    by arithmetic or memory. frozen_flops: of a picture, in the layers that are not trained.
    """

    mode: Mode
    note: str
    work: Work
    machine: Machine
    frozen_flops: float
    workers: int

    def min_step_seconds(self, batch: int) -> float:
        """Seconds that a step on `batch` pictures, over all workers, takes each of them at least."""
        work = replace(self.work, batch=batch)
        split = self.mode.name == "head"
        frozen = self.frozen_flops * -(-batch // self.workers) / self.machine.matrix_rate
        return frozen + cost.min_step_seconds(work, self.machine, self.workers, split=split)


def choose(
    config: TrainConfig,
    worker: Worker,
    parts: Parts,
    loader: Loader,
    arithmetic: Arithmetic,
    recorded: str = "",
) -> ParallelPlan:
    """Divide the steps of a run as configured; all workers call it.

    recorded: the mode of the checkpoint that the run goes on from, which `auto` stays with.

    Raises:
        UserError: on all workers, if the configured way can't be gone.
    """
    workers, settings = worker.world_size, config.parallel
    work, frozen_flops = _work(config, parts, loader, arithmetic, workers)
    with raise_on_all_ranks():
        _require_use(config, parts, workers)
    matrix_rate, memory_rate = measure.rates(worker.device, arithmetic)
    machine = Machine(matrix_rate, memory_rate)
    name, note = str(settings.mode), "as set by --parallel"
    if workers == 1:
        name, note = "data", "one worker: nothing to exchange"
    elif name == "auto":
        if not work.split_parameters:
            name, note = "data", "this model has no linear layers worth splitting"
        elif recorded:
            name, note = recorded, "as the checkpoint that this run goes on from"
        else:
            name, note, machine = _decide(work, machine, config, worker, parts, arithmetic)
    name = gather(name)[0]
    if worker.device.type == "cuda":  # what was measured is no part of the run's memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(worker.device)
    mode: Mode
    if name == "head":
        mode = SplitHead(worker, parts.trained, settings, cached=loader.features)
    else:
        mode = DataParallel(worker, parts.trained, settings)
    if workers > 1:
        sent = {c: _cost(c, work, machine, workers, config).sent for c in ("data", "head")}
        what = f"{_megabytes(sent[name])} sent a step by each worker"
        if work.split_parameters:
            other = "data" if name == "head" else "head"
            what += f", {_megabytes(sent[other])} with --parallel {other}"
        note = f"{name}: {what} ({note})"
    else:
        note = f"{name} ({note})"
    return ParallelPlan(mode, note, work, machine, frozen_flops, workers)


def _decide(
    work: Work, machine: Machine, config: TrainConfig, worker: Worker, parts: Parts, arithmetic: Arithmetic
) -> tuple[str, str, Machine]:
    """The faster way by the cost model, on the measured link and the measured speed of the classifier."""
    rate, latency = measure.link(worker.device)
    classifier = parts.trained.get_submodule(CLASSIFIER)
    assert isinstance(classifier, nn.Sequential)
    first = next(layer for layer in classifier if isinstance(layer, nn.Linear))
    share = -(-work.batch // worker.world_size)
    features = torch.zeros(share, first.in_features, device=worker.device)
    seconds = measure.step_seconds(classifier, features, arithmetic)
    # What the measured pass, without the optimiser's part, takes longer than by the rates alone.
    weights = work.parameters - work.data_parameters
    passes = weights * 4 * cost.GRADIENT_PASSES / machine.memory_rate
    # Forward 2, backward 4 a weight; the first layer's input here needs no gradient.
    flops = 6 * weights - 2 * first.weight.numel()
    least = max(flops * share / machine.matrix_rate, passes)
    speed = min(least / seconds, 1.0)
    found = torch.tensor([machine.matrix_rate * speed, machine.memory_rate * speed], dtype=torch.float64)
    slowest = [min(values) for values in zip(*gather(found.tolist()), strict=True)]
    measured = Machine(slowest[0], slowest[1], rate, latency)
    data = _cost("data", work, measured, worker.world_size, config)
    head = _cost("head", work, measured, worker.world_size, config)
    name = "head" if data.seconds > _WORTH * head.seconds else "data"
    note = (
        f"--parallel auto: about {head.seconds:.2g} s a step with the head split, {data.seconds:.2g} s "
        f"without, over a link of {rate * 8e-9:.3g} Gbit/s"
    )
    return name, note, replace(machine, link_rate=rate, latency=latency)


def _cost(name: str, work: Work, machine: Machine, workers: int, config: TrainConfig) -> Cost:
    function = cost.split_head if name == "head" else cost.data_parallel
    return function(work, machine, workers, _gradient_bytes(work, config))


def _gradient_bytes(work: Work, config: TrainConfig) -> float:
    """Of a parameter, as gradients are exchanged; PowerSGD's for a square matrix of all of them."""
    kind = config.parallel.gradient_compression
    if kind == "powersgd":
        side = max(int(work.parameters**0.5), 1)
        return powersgd_bytes((side, side), config.parallel.powersgd_rank) / side**2
    return 2.0 if kind == "bf16" else 4.0


def _work(
    config: TrainConfig, parts: Parts, loader: Loader, arithmetic: Arithmetic, workers: int
) -> tuple[Work, float]:
    """The sizes of a step, and the FLOP of a picture in the frozen layers, 0 from a cache."""
    info = loader.info
    shape: tuple[int, ...] = (info.channels, info.height, info.width)
    frozen_flops = 0.0
    if parts.frozen is not None:
        frozen_flops, shape = measure.flops(parts.frozen, shape)
    flops, _ = measure.flops(parts.trained, shape)
    trained = sum(p.numel() for p in parts.trained.parameters() if p.requires_grad)
    work = Work(config.loop.batch_size, flops, trained)
    if loader.features:
        frozen_flops = 0.0
    layers = can_split(parts.trained, workers)
    if layers is None:
        return work, frozen_flops
    first, second = layers
    in_classifier = sum(p.numel() for p in parts.trained.get_submodule(CLASSIFIER).parameters())
    split = sum(p.numel() for p in first.parameters()) + second.weight.numel()
    work = replace(
        work,
        split_parameters=split,
        data_parameters=trained - in_classifier,
        columns=second.out_features,
        gathered=0 if loader.features else first.in_features,
        activation_bytes=2 if arithmetic.bfloat16 else 4,
        # Behind trained convolutions, the first linear layer is not the last whose gradient is computed.
        early_parameters=in_classifier - sum(p.numel() for p in first.parameters())
        if trained == in_classifier
        else 0,
    )
    return work, frozen_flops


def can_split(trained: nn.Module, workers: int) -> tuple[nn.Linear, nn.Linear] | None:
    """The two layers of `trained` that can be split over `workers`, None if there are none."""
    try:
        (_, first), (_, second) = linear_layers(_classifier(trained), workers)
    except UserError:
        return None
    return first, second


def _classifier(trained: nn.Module) -> nn.Module:
    return dict(trained.named_children()).get(CLASSIFIER, nn.Identity())


def _require_use(config: TrainConfig, parts: Parts, workers: int) -> None:
    """Refuse settings that would do nothing, or can't be followed.

    Raises:
        UserError: naming them.
    """
    settings = config.parallel
    if settings.mode != "head":
        return
    classifier = _classifier(parts.trained)
    linear_layers(classifier, workers)
    others = set(parts.trained.parameters()) - set(classifier.parameters())
    if settings.gradient_compression != "none" and not any(p.requires_grad for p in others):
        raise UserError(
            f"--gradient-compression {settings.gradient_compression}: with --parallel head this run averages "
            "no gradients: leave it out, or train blocks of convolutions with --trainable-blocks"
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.3g} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
