"""The two parallel modes, as the training loop uses them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from cvdist.config import ParallelConfig
from cvdist.data.dataset import Batch, Loader
from cvdist.data.sampler import partition
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.tensor_shard import TensorShard
from cvdist.distributed.traffic import Traffic, ring_bytes
from cvdist.models.frozen import FrozenAndTrained

logger = logging.getLogger(__name__)

POWERSGD_START = 10  # steps whose gradients are averaged exactly, before PowerSGD begins to approximate them


class Mode:
    """The division of a run's steps over the workers.

    Attributes:
        name: The mode's name, as `--parallel` takes it.
        rank: The rank by which this worker takes its batches. It is 0 on all workers if all compute the same
            ones.
        world_size: The number of workers by which batches are partitioned, 1 if all compute the same ones.
        random_rank: The rank whose random stream this worker's dropout draws from.
        counts: Whether this worker's losses and predictions count. Of workers with the same batches, rank 0's
            do.
        replica: The module that a step calls with this worker's batch. Losses are scaled as for an average over
            `world_size` workers.
        traffic: Counts what this worker sends.
        shards: This worker's shard of each trained parameter that is split, by name. It has the others whole.
    """

    name: str

    def __init__(self, worker: RankInfo, trained: nn.Module, settings: ParallelConfig) -> None:
        """Divide the steps of `trained`, the trained modules. `settings`: how gradients are averaged."""
        self.rank, self.world_size, self.random_rank = worker.rank, worker.world_size, worker.rank
        self.counts, self.traffic = True, Traffic(worker.device)
        self.replica: nn.Module = trained
        self.shards: Mapping[str, TensorShard] = {}
        self._worker, self._trained, self._settings = worker, trained, settings
        self._averaged: DistributedDataParallel | None = None

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Return the context for one micro-batch's forward and backward pass.

        Gradients are averaged over the workers in the last micro-batch of a step.
        """
        with self._averaged.no_sync() if self._averaged is not None and not last else nullcontext():
            yield
        self.traffic.end()

    def clip(self, named: Mapping[str, nn.Parameter], max_norm: float) -> None:
        """Scale all gradients to an L2 norm, over the shards of all workers together, of `max_norm` at most."""
        nn.utils.clip_grad_norm_(named.values(), max_norm)

    def wrap(self) -> None:
        """Make the replica again, after parameters were frozen or released. All workers must call this."""
        raise NotImplementedError

    def align(self) -> None:
        """Make the parameters equal on all workers that are meant to be equal. All workers must call this."""

    def valid_batches(self, loader: Loader, batch_size: int) -> Iterator[Batch]:
        """Yield this worker's validation batches."""
        return loader.valid_batches(self.rank, self.world_size, batch_size)

    def _average(self, module: nn.Module) -> DistributedDataParallel:
        """Average the gradients of `module` from now on."""
        self._averaged = averaging(module, self._worker, self._settings, self.traffic)
        return self._averaged

    def _stop_averaging(self, replica: nn.Module) -> None:
        """Take `replica` in place of one whose gradients are averaged."""
        self.replica = replica
        if self._averaged is not None:
            self._averaged = None
            gc.collect()  # which takes the old exchange's hooks from the parameters


class DataParallel(Mode):
    """Each worker has the whole model and a local batch (Li et al. 2020, arXiv:2006.15704)."""

    name = "data"

    def __init__(self, worker: RankInfo, trained: nn.Module, settings: ParallelConfig) -> None:
        """Wrap `trained`, the trained modules, so that gradients are averaged if there are other workers."""
        super().__init__(worker, trained, settings)
        self.wrap()

    def wrap(self) -> None:
        """Average the gradients of what is trained now, if there are other workers."""
        self._stop_averaging(self._trained)
        if self.world_size > 1:
            self.replica = self._average(self._trained)


class SplitHead(Mode):
    """The first two linear layers of the classifier are split over the workers.

    With a cache, every worker reads the same batches from its node's copy, and only the activations between the
    two layers are exchanged. Otherwise each worker has a local batch: the layers in front of the classifier are
    data parallel, and their output is gathered (Krizhevsky 2014, arXiv:1404.5997, scheme (b) of section 4).
    """

    name = "head"

    def __init__(
        self, worker: RankInfo, modules: FrozenAndTrained, settings: ParallelConfig, *, cached: bool
    ) -> None:
        """Split the head in place, which the whole model shares.

        Args:
            worker: This worker.
            modules: The model.
            settings: How gradients are averaged in front of the classifier.
            cached: Whether batches are cached features.

        Raises:
            UserError: If the classifier can't be split.
        """
        from cvdist.parallel.head import Workers, split_classifier  # PyTorch's DTensor takes long to import

        super().__init__(worker, modules.trained, settings)
        if cached:
            self.rank, self.world_size, self.counts = 0, 1, worker.rank == 0
        self.random_rank = 0  # all workers draw what one process would draw
        self._cached = cached
        classifier = modules.trained.get_submodule(modules.head)
        assert isinstance(classifier, nn.Sequential)
        shards = split_classifier(classifier, Workers(worker.device, self.traffic), gather=not cached)
        self.shards = {f"{modules.head}.{name}": shard for name, shard in shards.items()}
        self._backbone, self._classifier = modules.backbone, classifier
        self.wrap()

    def wrap(self) -> None:
        """Average the gradients in front of the classifier, where anything is trained there now."""
        if self._backbone is None:
            return
        self._stop_averaging(nn.Sequential(self._backbone, self._classifier))
        if any(p.requires_grad for p in self._backbone.parameters()):
            self.replica = nn.Sequential(self._average(self._backbone), self._classifier)

    def clip(self, named: Mapping[str, nn.Parameter], max_norm: float) -> None:
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        split = [gradient for name, gradient in gradients.items() if name in self.shards]
        whole = [gradient for name, gradient in gradients.items() if name not in self.shards]
        squared = nn.utils.get_total_norm(split).square()
        dist.all_reduce(squared)
        total = (squared + nn.utils.get_total_norm(whole).square()).sqrt()
        nn.utils.clip_grads_with_norm_(named.values(), max_norm, total)

    def align(self) -> None:
        """Copy rank 0's parameters that are not split to all workers.

        Their gradients are the same on all workers, except for the rounding errors of different processors.
        """
        for name, parameter in self._trained.named_parameters():
            if name not in self.shards and parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)

    def valid_batches(self, loader: Loader, batch_size: int) -> Iterator[Batch]:
        """Yield this worker's validation batches, followed by empty ones where other workers have more.

        All workers have to call a split model together. With a cache, all of them get the same batches.
        """
        batches = super().valid_batches(loader, batch_size)
        if self._cached:
            yield from batches
            return
        calls = -(-len(partition(loader.info.valid_size, self.world_size - 1, self.world_size)) // batch_size)
        for batch in batches:
            calls -= 1
            yield batch
        info, device, none = loader.info, self._worker.device, torch.zeros(0, dtype=torch.int64)
        for _ in range(calls):
            images = torch.zeros(0, info.channels, info.height, info.width, device=device)
            yield Batch(images, none.to(device), none, 0)


def averaging(
    module: nn.Module, worker: RankInfo, settings: ParallelConfig, traffic: Traffic
) -> DistributedDataParallel:
    """Wrap `module` so that its gradients are averaged over all workers.

    Args:
        module: The module, on the worker's device.
        worker: This worker.
        settings: How gradients are compressed for the exchange.
        traffic: Counts the bytes and the waiting.
    """
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)
    state, hook, sent = _compression(settings)
    before: list[torch.futures.Future[Tensor]] = []

    def exchange(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        traffic.sent(ring_bytes(sent(bucket), worker.world_size))
        if bucket.is_last():
            traffic.begin()  # the backward pass is over: from here on the step only waits
        if settings.gradient_compression != "powersgd":
            return hook(state, bucket)
        # PowerSGD runs several exchanges for each bucket, one after the other. Those of two buckets at once
        # might be started in another order on another worker, and gloo pairs them up in the order of their
        # start.
        if before:
            before.pop().wait()
        future = hook(state, bucket)
        if not bucket.is_last():
            before.append(future)
        return future

    # A lambda, because PyTorch checks the annotations of a hook that has any.
    wrapped.register_comm_hook(state, lambda state, bucket: exchange(state, bucket))
    return wrapped


_Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]


def _compression(settings: ParallelConfig) -> tuple[Any, _Hook, Callable[[Any], float]]:
    """Return an exchange's state and hook, and a function from a bucket to the bytes that it all-reduces."""
    group = dist.group.WORLD
    if settings.gradient_compression == "bf16":
        return group, default_hooks.bf16_compress_hook, lambda bucket: bucket.buffer().numel() * 2
    if settings.gradient_compression == "none":
        return group, default_hooks.allreduce_hook, lambda bucket: bucket.buffer().nbytes
    # Vogels et al. 2019, arXiv:1905.13727. What the approximation leaves out is added to the next step's
    # gradient. Checkpoints don't have it, so a restart loses one step's remainder.
    state = powerSGD_hook.PowerSGDState(
        process_group=group,
        matrix_approximation_rank=settings.powersgd_rank,
        start_powerSGD_iter=POWERSGD_START,
    )

    def sent(bucket: Any) -> float:
        if state.iter < POWERSGD_START:
            return bucket.buffer().nbytes
        return sum(powersgd_bytes(tuple(g.shape), settings.powersgd_rank) for g in bucket.gradients())

    return state, powerSGD_hook.powerSGD_hook, sent


def powersgd_bytes(shape: tuple[int, ...], rank: int) -> float:
    """Return the bytes that PowerSGD exchanges for one gradient, in float32.

    It exchanges two thin matrices, or the gradient itself where that is smaller.

    Args:
        shape: Shape of the gradient.
        rank: Rank of the approximation.
    """
    rows, columns = shape[0], 1
    for size in shape[1:]:
        columns *= size
    whole, rank = rows * columns, min(rank, rows, columns)
    thin = (rows + columns) * rank
    return 4.0 * (thin if len(shape) > 1 and 2 * thin < whole else whole)
