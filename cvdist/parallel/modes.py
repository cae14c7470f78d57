"""The two ways to divide a step, as the training loop sees them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from cvdist.config import ParallelConfig
from cvdist.data.dataset import Batch, Loader
from cvdist.data.sampler import deal
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.tensor_shard import TensorShard
from cvdist.distributed.traffic import Traffic, ring_bytes
from cvdist.parallel.head import Workers, split_classifier

logger = logging.getLogger(__name__)

CLASSIFIER = "classifier"  # the child of a model that can be split
_POWERSGD_START = 10  # steps that are averaged as they are, before the first approximation


class Mode(Protocol):
    """How the steps of a run are divided.

    name: as `--parallel` takes it.
    rank, world_size: as whom this worker takes its batches: as itself or, where all workers compute the same
        ones, as the only one.
    random_rank: whose stream of dropout it draws from.
    counts: whether what this worker measures of its batches is to be counted; of equal ones, rank 0's is.
    replica: what a step calls, on this worker's batch; losses are scaled as for an average over `world_size`.
    slices: which part of each trained parameter this worker has, by name; the others it has whole.
    """

    name: str
    rank: int
    world_size: int
    random_rank: int
    counts: bool
    replica: nn.Module
    traffic: Traffic
    slices: Mapping[str, TensorShard]

    def portion(self, *, last: bool) -> Any:
        """Context of a portion's forward and backward pass; in the last one, gradients are exchanged."""
        ...

    def clip(self, named: Mapping[str, nn.Parameter], most: float) -> None:
        """Scale all gradients so that their L2 norm, over all workers' parts together, is at most `most`."""
        ...

    def align(self) -> None:
        """Make equal what is meant to be equal on all workers; all of them call it."""
        ...

    def valid_batches(self, loader: Loader, batch_size: int) -> Iterator[Batch]:
        """Validation batches of this worker, as many as its model has to be called with."""
        ...


class DataParallel:
    """Each worker has the whole model and a share of each batch (Li et al. 2020, arXiv:2006.15704)."""

    name = "data"

    def __init__(self, worker: RankInfo, trained: nn.Module, config: ParallelConfig) -> None:
        """`trained`: what is trained of the model; with one worker it has nobody to average with."""
        self.rank, self.world_size, self.random_rank = worker.rank, worker.world_size, worker.rank
        self.counts, self.traffic = True, Traffic(worker.device)
        self.slices: Mapping[str, TensorShard] = {}
        alone = worker.world_size == 1
        self.replica = trained if alone else averaging(trained, worker, config, self.traffic)

    @contextmanager
    def portion(self, *, last: bool) -> Iterator[None]:
        """See `Mode.portion`."""
        # Gradients are averaged over the workers once a step, after the last portion.
        averaged = self.replica if isinstance(self.replica, DistributedDataParallel) else None
        with averaged.no_sync() if averaged is not None and not last else nullcontext():
            yield
        self.traffic.end()

    def clip(self, named: Mapping[str, nn.Parameter], most: float) -> None:
        """See `Mode.clip`."""
        nn.utils.clip_grad_norm_(named.values(), most)

    def align(self) -> None:
        """See `Mode.align`: averages are the same everywhere."""

    def valid_batches(self, loader: Loader, batch_size: int) -> Iterator[Batch]:
        """See `Mode.valid_batches`."""
        return loader.valid_batches(self.rank, self.world_size, batch_size)


class SplitHead:
    """The first two linear layers of the classifier are split over the workers.

    From a cache every worker reads the same batches from its node's copy, and nothing but the activations
    between the two layers is exchanged. Else each has its share of the pictures: the layers before the
    classifier are data-parallel, and their output is gathered (Krizhevsky 2014, arXiv:1404.5997, scheme (b) of
    section 4).
    """

    name = "head"

    def __init__(self, worker: RankInfo, trained: nn.Module, config: ParallelConfig, *, cached: bool) -> None:
        """Split `trained.classifier` in place, which the whole model shares.

        Raises:
            UserError: if it can't be split.
        """
        self.rank, self.world_size = (0, 1) if cached else (worker.rank, worker.world_size)
        self.random_rank = 0  # all draw what one process would draw
        self.counts = not cached or worker.rank == 0
        self.traffic = Traffic(worker.device)
        self._worker, self._trained, self._cached = worker, trained, cached
        classifier = trained.get_submodule(CLASSIFIER)
        assert isinstance(classifier, nn.Sequential)
        split = split_classifier(classifier, Workers(worker.device, self.traffic), shares=not cached)
        self.slices: Mapping[str, TensorShard] = {f"{CLASSIFIER}.{name}": part for name, part in split.items()}
        self._averaged: DistributedDataParallel | None = None
        self.replica = self._replica(config)

    def _replica(self, config: ParallelConfig) -> nn.Module:
        children = OrderedDict(self._trained.named_children())
        before = nn.Sequential(OrderedDict((k, v) for k, v in children.items() if k != CLASSIFIER))
        if list(children)[-1] != CLASSIFIER or not any(p.requires_grad for p in before.parameters()):
            return self._trained
        self._averaged = averaging(before, self._worker, config, self.traffic)
        return nn.Sequential(self._averaged, children[CLASSIFIER])

    @contextmanager
    def portion(self, *, last: bool) -> Iterator[None]:
        """See `Mode.portion`."""
        with self._averaged.no_sync() if self._averaged is not None and not last else nullcontext():
            yield
        self.traffic.end()

    def clip(self, named: Mapping[str, nn.Parameter], most: float) -> None:
        """See `Mode.clip`."""
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        split = [gradient for name, gradient in gradients.items() if name in self.slices]
        whole = [gradient for name, gradient in gradients.items() if name not in self.slices]
        squared = nn.utils.get_total_norm(split).square()
        dist.all_reduce(squared)
        total = (squared + nn.utils.get_total_norm(whole).square()).sqrt()
        nn.utils.clip_grads_with_norm_(named.values(), most, total)

    def align(self) -> None:
        """See `Mode.align`.

        The layers that are not split get the same gradients everywhere, up to what different processors make of
        the same arithmetic.
        """
        for name, parameter in self._trained.named_parameters():
            if name not in self.slices and parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)

    def valid_batches(self, loader: Loader, batch_size: int) -> Iterator[Batch]:
        """See `Mode.valid_batches`: shares are filled up with empty batches to the same number of calls."""
        if self._cached:
            yield from loader.valid_batches(0, 1, batch_size)
            return
        calls = -(-len(deal(loader.info.valid_size, self.world_size - 1, self.world_size)) // batch_size)
        info, device = loader.info, self._worker.device
        for batch in loader.valid_batches(self.rank, self.world_size, batch_size):
            calls -= 1
            yield batch
        none = torch.zeros(0, dtype=torch.int64)
        for _ in range(calls):
            images = torch.zeros(0, info.channels, info.height, info.width, device=device)
            yield Batch(images, none.to(device), none, 0)


def averaging(
    module: nn.Module, worker: RankInfo, config: ParallelConfig, traffic: Traffic
) -> DistributedDataParallel:
    """`module`, whose gradients are averaged over all workers, compressed as configured and counted."""
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)
    state, hook, sent = _compression(config)
    before: list[torch.futures.Future[Tensor]] = []

    def exchange(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        traffic.sent(ring_bytes(sent(bucket), worker.world_size))
        if bucket.is_last():
            traffic.begin()  # the backward pass is over: from here on the step only waits
        if config.gradient_compression != "powersgd":
            return hook(state, bucket)
        # Its exchanges start one another. Those of two buckets at once might come in another order on another
        # worker, and gloo takes them as they come.
        if before:
            before.pop().wait()
        future = hook(state, bucket)
        if not bucket.is_last():
            before.append(future)
        return future

    # PyTorch looks at annotations, of which a lambda has none.
    wrapped.register_comm_hook(state, lambda state, bucket: exchange(state, bucket))
    return wrapped


_Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]


def _compression(config: ParallelConfig) -> tuple[Any, _Hook, Callable[[Any], float]]:
    """State and hook of an exchange, and the bytes that it all-reduces of a bucket."""
    group = dist.group.WORLD
    if config.gradient_compression == "bf16":
        return group, default_hooks.bf16_compress_hook, lambda bucket: bucket.buffer().numel() * 2
    if config.gradient_compression == "none":
        return group, default_hooks.allreduce_hook, lambda bucket: bucket.buffer().nbytes
    # Vogels et al. 2019, arXiv:1905.13727. What the approximation leaves out is added to the next gradient. Not
    # in checkpoints: a restart loses one step's remainder.
    state = powerSGD_hook.PowerSGDState(
        process_group=group,
        matrix_approximation_rank=config.powersgd_rank,
        start_powerSGD_iter=_POWERSGD_START,
    )

    def sent(bucket: Any) -> float:
        if state.iter < _POWERSGD_START:
            return bucket.buffer().nbytes
        return sum(powersgd_bytes(tuple(g.shape), config.powersgd_rank) for g in bucket.gradients())

    return state, powerSGD_hook.powerSGD_hook, sent


def powersgd_bytes(shape: tuple[int, ...], rank: int) -> float:
    """Bytes that PowerSGD exchanges for a gradient, float32: of two thin matrices, where they are smaller."""
    rows, columns = shape[0], 1
    for size in shape[1:]:
        columns *= size
    whole, rank = rows * columns, min(rank, rows, columns)
    thin = (rows + columns) * rank
    return 4.0 * (thin if len(shape) > 1 and 2 * thin < whole else whole)
