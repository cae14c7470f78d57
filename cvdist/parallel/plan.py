"""Chooses which of the two parallel modes a run uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from cvdist.config import ParallelConfig
from cvdist.data.dataset import Loader
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.precision import Precision
from cvdist.distributed.ranks import RankInfo
from cvdist.errors import UserError
from cvdist.models.frozen import FrozenAndTrained
from cvdist.parallel import cost, measure
from cvdist.parallel.cost import Cost, Machine, Work
from cvdist.parallel.modes import DataParallel, Mode, SplitHead, powersgd_bytes

_MIN_SPEEDUP = (
    1.1  # `auto` splits the head only if that is faster by a tenth: data parallelism is the plainer way
)


@dataclass(frozen=True)
class ParallelPlan:
    """The division of a run's steps over the workers, and what is known about the cost of a step.

    Attributes:
        mode: The parallel mode.
        note: One line that says which mode was chosen and why.
        work: The size of a step.
        machine: The measured rates of this worker.
        frozen_flops: FLOP of one picture's forward pass through the frozen layers. 0 if they are not run.
        workers: Number of workers.
    """

    mode: Mode
    note: str
    work: Work
    machine: Machine
    frozen_flops: float
    workers: int

    def min_step_seconds(self, batch: int) -> float:
        """Return the least seconds that a step on `batch` pictures, over all workers, can take."""
        work = replace(self.work, batch=batch)
        split = self.mode.name == "head"
        frozen = self.frozen_flops * -(-batch // self.workers) / self.machine.matrix_rate
        return frozen + cost.min_step_seconds(work, self.machine, self.workers, split=split)


def choose_plan(
    settings: ParallelConfig,
    batch_size: int,
    worker: RankInfo,
    modules: FrozenAndTrained,
    loader: Loader,
    precision: Precision,
    recorded: str = "",
) -> ParallelPlan:
    """Choose the parallel mode of a run and set it up. All workers must call this.

    Args:
        settings: What the user asked for.
        batch_size: Pictures a step, over all workers.
        worker: This worker.
        modules: The model. A split head replaces its linear layers in place.
        loader: The data.
        precision: The precision of forward passes.
        recorded: The mode of the checkpoint that the run continues from, which `--parallel auto` keeps. Empty
            if there is none.

    Raises:
        UserError: On all workers, if the mode that the user asked for is not possible.
    """
    workers = worker.world_size
    work, frozen_flops = step_work(batch_size, modules, loader, precision, workers)
    scaled = precision.half is torch.float16 and workers > 1
    with raise_on_all_ranks():
        _require_use(settings, modules, workers)
        if scaled and settings.mode == "head":
            raise UserError("--parallel head can't scale gradients for float16: set another --precision")
    machine = Machine(*measure.rates(worker.device, precision))
    name, reason = choose_mode(
        settings,
        work,
        workers,
        lambda: _measure_classifier(work, machine, worker, modules, precision),
        recorded,
    )
    name = "data" if scaled else gather(name)[0]
    if worker.device.type == "cuda":  # the memory that the measurements took is no part of the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(worker.device)
    mode: Mode
    if name == "head":
        mode = SplitHead(worker, modules, settings, cached=loader.features)
    else:
        mode = DataParallel(worker, modules.trained, settings)
    note = describe(name, reason, settings, work, machine, workers)
    return ParallelPlan(mode, note, work, machine, frozen_flops, workers)


def choose_mode(
    settings: ParallelConfig, work: Work, workers: int, measured: Callable[[], Machine], recorded: str = ""
) -> tuple[str, str]:
    """Return the name of the parallel mode, and the reason for it.

    Args:
        settings: What the user asked for.
        work: The size of a step.
        workers: Number of workers.
        measured: Measures the workers and the link between them. It is called only if the answer depends on it.
        recorded: The mode of the checkpoint that the run continues from. Empty if there is none.
    """
    if workers == 1:
        return "data", "one worker: nothing to exchange"
    if settings.mode != "auto":
        return settings.mode, "as set by --parallel"
    if not work.split_parameters:
        return "data", "this model has no linear layers worth splitting"
    if recorded:
        return recorded, "as the checkpoint that this run goes on from"
    machine = measured()
    data = _cost("data", work, machine, workers, settings)
    head = _cost("head", work, machine, workers, settings)
    reason = (
        f"--parallel auto: about {head.seconds:.2g} s a step with the head split, {data.seconds:.2g} s "
        f"without, over a link of {machine.link_rate * 8e-9:.3g} Gbit/s"
    )
    return ("head" if data.seconds > _MIN_SPEEDUP * head.seconds else "data"), reason


def describe(
    name: str, reason: str, settings: ParallelConfig, work: Work, machine: Machine, workers: int
) -> str:
    """Return one line that says which mode was chosen, why, and how many bytes it sends."""
    if workers == 1:
        return f"{name} ({reason})"
    sent = {mode: _cost(mode, work, machine, workers, settings).sent for mode in ("data", "head")}
    text = f"{_megabytes(sent[name])} sent a step by each worker"
    if work.split_parameters:
        other = "data" if name == "head" else "head"
        text += f", {_megabytes(sent[other])} with --parallel {other}"
    return f"{name}: {text} ({reason})"


def step_work(
    batch_size: int, modules: FrozenAndTrained, loader: Loader, precision: Precision, workers: int
) -> tuple[Work, float]:
    """Return the size of a step, and the FLOP of one picture's forward pass through the frozen layers.

    The latter is 0 if the batches are cached features. Nothing is computed or allocated.
    """
    info = loader.info
    shape: tuple[int, ...] = (info.channels, info.height, info.width)
    frozen_flops = 0.0
    if modules.frozen is not None:
        frozen_flops, shape = measure.flops(modules.frozen, shape)
    flops, _ = measure.flops(modules.trained, shape)
    trained = sum(p.numel() for p in modules.trained.parameters() if p.requires_grad)
    work = Work(batch_size, flops, trained)
    if loader.features:
        frozen_flops = 0.0
    layers = can_split(modules, workers)
    if layers is None:
        return work, frozen_flops
    first, second = layers
    in_classifier = sum(p.numel() for p in _head(modules).parameters())
    split = sum(p.numel() for p in first.parameters()) + second.weight.numel()
    # Behind trained convolutions, the first linear layer is not the last one whose gradient is computed.
    early = in_classifier - sum(p.numel() for p in first.parameters()) if trained == in_classifier else 0
    work = replace(
        work,
        split_parameters=split,
        data_parameters=trained - in_classifier,
        columns=second.out_features,
        gathered=0 if loader.features else first.in_features,
        activation_bytes=2 if precision.half is not None else 4,
        early_parameters=early,
    )
    return work, frozen_flops


def can_split(modules: FrozenAndTrained, workers: int) -> tuple[nn.Linear, nn.Linear] | None:
    """Return the two linear layers of the head that can be split over `workers`, or None if there are none."""
    from cvdist.parallel.head import linear_layers  # PyTorch's DTensor takes long to import

    try:
        (_, first), (_, second) = linear_layers(_head(modules), workers)
    except UserError:
        return None
    return first, second


def _measure_classifier(
    work: Work, machine: Machine, worker: RankInfo, modules: FrozenAndTrained, precision: Precision
) -> Machine:
    """Measure the link between the workers, and the slowest worker's rates for the classifier.

    `machine` has this worker's rates for large matrices. The classifier's passes take longer than these rates
    say, so the rates are reduced to what explains the time that they took.
    """
    rate, latency = measure.link(worker.device)
    classifier = _head(modules)
    assert isinstance(classifier, nn.Sequential)
    first = next(layer for layer in classifier if isinstance(layer, nn.Linear))
    local = -(-work.batch // worker.world_size)
    features = torch.zeros(local, first.in_features, device=worker.device)
    seconds = measure.step_seconds(classifier, features, precision)
    # The measured passes do not include the optimizer's.
    weights = work.parameters - work.data_parameters
    passes = weights * 4 * cost.GRADIENT_PASSES / machine.memory_rate
    # 2 FLOP a weight forward and 4 backward, except that the first layer's input needs no gradient here.
    flops = 6 * weights - 2 * first.weight.numel()
    least = max(flops * local / machine.matrix_rate, passes)
    speed = min(least / seconds, 1.0)
    mine = (machine.matrix_rate * speed, machine.memory_rate * speed)
    slowest = [min(values) for values in zip(*gather(mine), strict=True)]
    return Machine(slowest[0], slowest[1], rate, latency)


def _cost(name: str, work: Work, machine: Machine, workers: int, settings: ParallelConfig) -> Cost:
    function = cost.split_head if name == "head" else cost.data_parallel
    return function(work, machine, workers, _gradient_bytes(work, settings))


def _gradient_bytes(work: Work, settings: ParallelConfig) -> float:
    """Return the bytes that one parameter's gradient takes in an exchange.

    PowerSGD's depend on the shapes of the parameters; one square matrix of all of them stands for these here.
    """
    kind = settings.gradient_compression
    if kind == "powersgd":
        side = max(int(work.parameters**0.5), 1)
        return powersgd_bytes((side, side), settings.powersgd_rank) / side**2
    return 2.0 if kind == "bf16" else 4.0


def _head(modules: FrozenAndTrained) -> nn.Module:
    return modules.trained.get_submodule(modules.head) if modules.head else nn.Identity()


def _require_use(settings: ParallelConfig, modules: FrozenAndTrained, workers: int) -> None:
    """Refuse settings that are impossible or would have no effect.

    Raises:
        UserError: Naming the flag.
    """
    if settings.mode != "head":
        return
    from cvdist.parallel.head import linear_layers  # PyTorch's DTensor takes long to import

    classifier = _head(modules)
    linear_layers(classifier, workers)
    others = set(modules.trained.parameters()) - set(classifier.parameters())
    if settings.gradient_compression != "none" and not any(p.requires_grad for p in others):
        raise UserError(
            f"--gradient-compression {settings.gradient_compression}: with --parallel head this run averages "
            "no gradients: leave it out, or train some of its stages with --trainable-stages"
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.3g} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
