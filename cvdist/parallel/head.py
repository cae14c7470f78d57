"""A classifier whose first two linear layers are split over the workers, as tensor parallelism is.

The first is split by columns (its outputs), the second by rows (its inputs), so that what lies between them, an
activation function and dropout, needs nothing of the other workers; only the second layer's output is summed
over all. Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3. `torch.distributed.tensor` knows what
each operation on split tensors means and which sums it needs. The parameters themselves stay ordinary tensors,
this worker's slices: optimiser, moving average and checkpoint see no difference.

Where each worker has a share of the batch's features, all of them are gathered in front of the classifier, and
each goes on with its own rows behind it. All functions here are called by all workers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from cvdist.distributed.tensor_shard import TensorShard, cut, part
from cvdist.distributed.traffic import Traffic, ring_bytes
from cvdist.errors import UserError

_POINTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Dropout, nn.Identity)


class Workers:
    """All workers as one row of a mesh; copies of a model share it."""

    def __init__(self, device: torch.device, traffic: Traffic) -> None:
        """Of the default process group, which has to be there."""
        self.traffic, self.rank, self.count = traffic, dist.get_rank(), dist.get_world_size()
        group = dist.group.WORLD
        assert group is not None
        self.mesh = DeviceMesh.from_group(group, device.type)
        # Numbers of rows go from host to host: with NCCL, a GPU would have to wait for them.
        self._hosts = group
        if dist.get_backend() != "gloo":
            hosts = dist.new_group(backend="gloo")
            assert isinstance(hosts, dist.ProcessGroup)
            self._hosts = hosts
        self.rows: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Workers:
        """A process group can't be copied, and need not be."""
        return self

    def tensor(self, local: Tensor, placement: Placement, shape: Sequence[int]) -> DTensor:
        """`local` as this worker's part of a contiguous tensor of `shape`; the parts may differ in size."""
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def count_rows(self, mine: int) -> None:
        """Tell each other how many rows each has."""
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(counts, torch.tensor([mine]), group=self._hosts)
        self.rows = [int(count) for count in counts]

    def gather(self, mine: Tensor) -> Tensor:
        """All workers' rows (n, ...), in the order of their ranks; `count_rows` comes first."""
        longest = max(self.rows)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        # Each worker sends its rows to all others: (n - 1) parts.
        with self.traffic.waiting((self.count - 1) * padded.nbytes):
            dist.all_gather(parts, padded)
        return torch.cat([part[:rows] for part, rows in zip(parts, self.rows, strict=True)])

    def own(self, whole: Tensor) -> Tensor:
        """This worker's rows of what `gather` gave."""
        return whole.narrow(0, sum(self.rows[: self.rank]), self.rows[self.rank])


class ColumnLinear(nn.Module):
    """A linear layer, some outputs on each worker: (n, in), the same on all, to (n, out / workers)."""

    def __init__(self, whole: nn.Linear, workers: Workers) -> None:
        """Keep this worker's slice of `whole`."""
        super().__init__()
        self._workers, self.in_features, self.out_features = workers, whole.in_features, whole.out_features
        self.slices = {
            name: cut(tuple(tensor.shape), 0, workers.count, workers.rank)
            for name, tensor in whole.named_parameters()
        }
        self.weight = _sliced(whole.weight, self.slices["weight"])
        self.bias = _sliced(whole.bias, self.slices["bias"]) if whole.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Local outputs; where `x` has a gradient, it is summed over the workers in the backward pass."""
        workers, out = self._workers, self.out_features
        replicated = workers.tensor(x, Replicate(), x.shape)
        if x.requires_grad:  # its gradient arrives as parts of a sum, which `tensor` sums on the way back
            size = ring_bytes(x.nbytes, workers.count)
            replicated.register_hook(partial(_begin, workers.traffic, size))
            x.register_hook(partial(_end, workers.traffic))
        weight = workers.tensor(self.weight, Shard(0), (out, self.in_features))
        bias = workers.tensor(self.bias, Shard(0), (out,)) if self.bias is not None else None
        # F.linear of such tensors gives such a tensor.
        return cast(DTensor, F.linear(replicated, weight, bias)).to_local()


class RowLinear(nn.Module):
    """A linear layer, some inputs on each worker: (n, in / workers) to (n, out), the same on all."""

    def __init__(self, whole: nn.Linear, workers: Workers) -> None:
        """Keep this worker's slice of `whole`, and its bias."""
        super().__init__()
        self._workers, self.in_features, self.out_features = workers, whole.in_features, whole.out_features
        self.slices = {"weight": cut(tuple(whole.weight.shape), 1, workers.count, workers.rank)}
        self.weight = _sliced(whole.weight, self.slices["weight"])
        self.bias = nn.Parameter(whole.bias.detach().clone()) if whole.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Sums over all inputs: the one exchange of a step from a cache."""
        workers = self._workers
        split = workers.tensor(x, Shard(1), (len(x), self.in_features))
        weight = workers.tensor(self.weight, Shard(1), (self.out_features, self.in_features))
        # The bias comes later: with it, redistributing the weights may look cheaper than a sum.
        summand = cast(DTensor, F.linear(split, weight))
        assert summand.placements == (Partial(),), summand.placements
        with workers.traffic.waiting(ring_bytes(summand.to_local().nbytes, workers.count)):
            total = summand.redistribute(placements=[Replicate()]).to_local()
        return total if self.bias is None else total + self.bias.to(total.dtype)


class ColumnDropout(nn.Module):
    """Dropout of some columns, by the mask that one process would draw for all of them.

    Every worker draws all of it from a stream in the same state, and uses its columns.
    """

    def __init__(self, p: float, columns: TensorShard) -> None:
        """`columns`: of a tensor of shape (outputs,)."""
        super().__init__()
        self.p, self._columns = p, columns

    def forward(self, x: Tensor) -> Tensor:
        """(n, columns of this worker) to the same."""
        if not self.training or not self.p:
            return x
        mask = F.dropout(torch.ones(len(x), self._columns.shape[0], dtype=x.dtype, device=x.device), self.p)
        return x * mask[:, self._columns.start : self._columns.stop]


def linear_layers(classifier: nn.Module, workers: int) -> list[tuple[int, nn.Linear]]:
    """The two layers of `classifier` that can be split, each with its place.

    Raises:
        UserError: if there are none, or `workers` are more than there are columns.
    """
    layers = list(classifier) if isinstance(classifier, nn.Sequential) else []
    found = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if len(found) < 2:
        raise UserError(
            "--parallel head splits the first two linear layers of a model's `classifier`, and this model has "
            f"{len(found)}: leave it out, or choose a VGG with --head vgg or mlp"
        )
    (place, first), (end, _) = found[:2]
    if not all(isinstance(layer, _POINTWISE) for layer in layers[place + 1 : end]):
        raise UserError(
            "--parallel head: between this model's first two linear layers is a layer that needs all columns "
            "at once: leave it out"
        )
    columns = first.out_features
    if not len(part(columns, workers, workers - 1)):
        raise UserError(
            f"--parallel head: the {columns} columns of the first linear layer are too few for {workers} "
            "workers: use fewer --num-workers, a larger --hidden-size, or --parallel data"
        )
    return found[:2]


def split_classifier(classifier: nn.Sequential, workers: Workers, *, shares: bool) -> dict[str, TensorShard]:
    """Replace the first two linear layers of `classifier`, in place, by this worker's parts of them.

    shares: whether each worker calls it with its own share of the batch, and not all with the same rows.
    Returns which part of each parameter it now has, by name; the others are whole on all workers.

    Raises:
        UserError: as `linear_layers`.
    """
    (first, columns_of), (second, rows_of) = linear_layers(classifier, workers.count)
    column, row = ColumnLinear(columns_of, workers), RowLinear(rows_of, workers)
    columns = cut((column.out_features,), 0, workers.count, workers.rank)
    classifier[first], classifier[second] = column, row
    for i, layer in enumerate(classifier):
        if isinstance(layer, nn.Dropout) and first < i < second:
            classifier[i] = ColumnDropout(layer.p, columns)
        elif isinstance(layer, nn.ReLU):
            layer.inplace = False  # what comes out of a split layer can't be changed under its tensor
    if shares:
        classifier.register_forward_pre_hook(_GatherRows(workers))
        classifier.register_forward_hook(_OwnRows(workers))
    return {
        f"{place}.{name}": slice_
        for place, layer in ((first, column), (second, row))
        for name, slice_ in layer.slices.items()
    }


class _Gathered(torch.autograd.Function):
    """All workers' rows; backwards, the gradient of this worker's.

    Its gradient is going to be averaged over the workers, as data-parallel ones are, hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.gather(mine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.own(gradients[0]) * ctx.workers.count, None


class _Own(torch.autograd.Function):
    """This worker's rows; backwards, the gradient of all rows, of which each worker knows its own.

    These are those of a mean over workers times their number (`TrainingLoop`), which is undone here.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.own(whole).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.gather(gradients[0].contiguous()) / ctx.workers.count, None


class _GatherRows:
    """In front of the classifier: its input from all workers."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        mine = inputs[0]
        self._workers.count_rows(len(mine))
        gathered: Tensor = _Gathered.apply(mine, self._workers)
        return (gathered,)


class _OwnRows:
    """Behind the classifier: the scores of this worker's rows."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own: Tensor = _Own.apply(output, self._workers)
        return own


def _sliced(whole: Tensor, mine: TensorShard) -> nn.Parameter:
    # A copy: a view would keep the whole tensor in memory.
    return nn.Parameter(mine.of(whole.detach()).clone(memory_format=torch.contiguous_format))


def _begin(traffic: Traffic, size: float, _: Any) -> None:
    traffic.sent(size)
    traffic.begin()


def _end(traffic: Traffic, _: Any) -> None:
    traffic.end()
