"""A classifier whose first two linear layers are split over the workers, as tensor parallelism is.

The first layer is split by columns (its outputs) and the second by rows (its inputs), so that the activation
function and the dropout between them need nothing from other workers, and only the second layer's output is
summed over all of them (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3).
`torch.distributed.tensor` knows which sums each operation on split tensors needs. The parameters stay ordinary
tensors, this worker's shards, so the optimizer, the moving average and the checkpoints need not know that they
are shards.

If each worker has a local batch, the features of all workers are gathered in front of the classifier, and each
worker keeps its own rows of the classifier's output. All workers must call the functions here alike.
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

from cvdist.distributed.tensor_shard import TensorShard, shard_of, shard_range
from cvdist.distributed.traffic import Traffic, ring_bytes
from cvdist.errors import UserError

_POINTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Dropout, nn.Identity)


class Workers:
    """All workers, as a mesh of one dimension. Copies of a model share it."""

    def __init__(self, device: torch.device, traffic: Traffic) -> None:
        """Use the default process group, which has to be initialized.

        Args:
            device: This worker's device.
            traffic: Counts what this worker sends.
        """
        self.traffic, self.rank, self.count = traffic, dist.get_rank(), dist.get_world_size()
        group = dist.group.WORLD
        assert group is not None
        self.mesh = DeviceMesh.from_group(group, device.type)
        # The numbers of rows are exchanged by gloo. With NCCL, the host would have to wait for the GPU.
        self._hosts = group
        if dist.get_backend() != "gloo":
            hosts = dist.new_group(backend="gloo")
            assert isinstance(hosts, dist.ProcessGroup)
            self._hosts = hosts
        self.rows: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Workers:
        """Return this same object, because a process group can't be copied."""
        return self

    def tensor(self, local: Tensor, placement: Placement, shape: Sequence[int]) -> DTensor:
        """Return a distributed tensor of which this worker has the shard `local`.

        Args:
            local: This worker's shard. The workers' shards may differ in size.
            placement: How the tensor is split or replicated.
            shape: Shape of the whole tensor, which is contiguous.
        """
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def count_rows(self, mine: int) -> None:
        """Tell all workers that this one has `mine` rows, and learn how many each of them has."""
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(counts, torch.tensor([mine]), group=self._hosts)
        self.rows = [int(count) for count in counts]

    def gather(self, mine: Tensor) -> Tensor:
        """Return the rows (n, ...) of all workers, by rank. `count_rows` must be called before."""
        longest = max(self.rows)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        gathered = [torch.empty_like(padded) for _ in range(self.count)]
        # Each worker sends its rows to all others.
        with self.traffic.waiting((self.count - 1) * padded.nbytes):
            dist.all_gather(gathered, padded)
        return torch.cat([one[:rows] for one, rows in zip(gathered, self.rows, strict=True)])

    def own(self, whole: Tensor) -> Tensor:
        """Return this worker's rows out of those of all workers, as a view."""
        return whole.narrow(0, sum(self.rows[: self.rank]), self.rows[self.rank])


class ColumnLinear(nn.Module):
    """A linear layer of which each worker computes some outputs.

    The input (n, in) is the same on all workers; the output is (n, outputs of this worker).
    """

    def __init__(self, whole: nn.Linear, workers: Workers) -> None:
        """Keep a copy of this worker's shard of the layer `whole`."""
        super().__init__()
        self._workers, self.in_features, self.out_features = workers, whole.in_features, whole.out_features
        self.shards = {
            name: shard_of(tuple(tensor.shape), 0, workers.count, workers.rank)
            for name, tensor in whole.named_parameters()
        }
        self.weight = _shard(whole.weight, self.shards["weight"])
        self.bias = _shard(whole.bias, self.shards["bias"]) if whole.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute this worker's outputs. Backward, the gradient of `x` is summed over the workers."""
        workers, out = self._workers, self.out_features
        replicated = workers.tensor(x, Replicate(), x.shape)
        if x.requires_grad:  # each worker has one summand of its gradient, and DTensor sums them
            size = ring_bytes(x.nbytes, workers.count)
            replicated.register_hook(partial(_begin, workers.traffic, size))
            x.register_hook(partial(_end, workers.traffic))
        weight = workers.tensor(self.weight, Shard(0), (out, self.in_features))
        bias = workers.tensor(self.bias, Shard(0), (out,)) if self.bias is not None else None
        # F.linear of distributed tensors returns a distributed tensor.
        return cast(DTensor, F.linear(replicated, weight, bias)).to_local()


class RowLinear(nn.Module):
    """A linear layer of which each worker has some inputs.

    The input is (n, inputs of this worker); the output (n, out) is the same on all workers.
    """

    def __init__(self, whole: nn.Linear, workers: Workers) -> None:
        """Keep a copy of this worker's shard of the weight of `whole`, and of the whole bias."""
        super().__init__()
        self._workers, self.in_features, self.out_features = workers, whole.in_features, whole.out_features
        self.shards = {"weight": shard_of(tuple(whole.weight.shape), 1, workers.count, workers.rank)}
        self.weight = _shard(whole.weight, self.shards["weight"])
        self.bias = nn.Parameter(whole.bias.detach().clone()) if whole.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the sums over all inputs. With a cache, this is the only exchange of a step."""
        workers = self._workers
        split = workers.tensor(x, Shard(1), (len(x), self.in_features))
        weight = workers.tensor(self.weight, Shard(1), (self.out_features, self.in_features))
        # The bias is added afterwards: with it, DTensor may redistribute the weights in place of a sum.
        summand = cast(DTensor, F.linear(split, weight))
        assert summand.placements == (Partial(),), summand.placements
        with workers.traffic.waiting(ring_bytes(summand.to_local().nbytes, workers.count)):
            total = summand.redistribute(placements=[Replicate()]).to_local()
        return total if self.bias is None else total + self.bias.to(total.dtype)


class ColumnDropout(nn.Module):
    """Dropout of this worker's columns, with the mask that one process would draw for all columns.

    Every worker draws the whole mask from a random stream in the same state, and uses its own columns.
    """

    def __init__(self, p: float, columns: TensorShard) -> None:
        """Drop activations.

        Args:
            p: Probability that an activation is dropped.
            columns: This worker's shard of a tensor of shape (outputs,).
        """
        super().__init__()
        self.p, self._columns = p, columns

    def forward(self, x: Tensor) -> Tensor:
        """Drop some of `x`, which has the shape (n, columns of this worker)."""
        if not self.training or not self.p:
            return x
        mask = F.dropout(torch.ones(len(x), self._columns.shape[0], dtype=x.dtype, device=x.device), self.p)
        return x * mask[:, self._columns.start : self._columns.stop]


def linear_layers(classifier: nn.Module, workers: int) -> list[tuple[int, nn.Linear]]:
    """Return the two layers of `classifier` that can be split over `workers`, each with its index.

    Raises:
        UserError: If there are none, or if the first has fewer columns than there are workers.
    """
    layers = list(classifier) if isinstance(classifier, nn.Sequential) else []
    found = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if len(found) < 2:
        raise UserError(
            "--parallel head splits the first two linear layers of a model's `classifier`, and this model has "
            f"{len(found)}: leave it out, or choose a VGG with --head vgg or mlp"
        )
    (start, first), (end, _) = found[:2]
    if not all(isinstance(layer, _POINTWISE) for layer in layers[start + 1 : end]):
        raise UserError(
            "--parallel head: between this model's first two linear layers is a layer that needs all columns "
            "at once: leave it out"
        )
    columns = first.out_features
    if not len(shard_range(columns, workers, workers - 1)):
        raise UserError(
            f"--parallel head: the {columns} columns of the first linear layer are too few for {workers} "
            "workers: use fewer --num-workers, a larger --hidden-size, or --parallel data"
        )
    return found[:2]


def split_classifier(classifier: nn.Sequential, workers: Workers, *, gather: bool) -> dict[str, TensorShard]:
    """Replace the first two linear layers of `classifier`, in place, by this worker's shards of them.

    Args:
        classifier: The classifier, the same on all workers.
        workers: The workers that it is split over.
        gather: Whether each worker will call it with a local batch, so that the rows of all have to be
            gathered. Otherwise all workers call it with the same rows.

    Returns:
        This worker's shard of each split parameter, by name. The other parameters are whole on all workers.

    Raises:
        UserError: If `linear_layers` finds no layers that can be split.
    """
    (first, columns_of), (second, rows_of) = linear_layers(classifier, workers.count)
    column, row = ColumnLinear(columns_of, workers), RowLinear(rows_of, workers)
    columns = shard_of((column.out_features,), 0, workers.count, workers.rank)
    classifier[first], classifier[second] = column, row
    for i, layer in enumerate(classifier):
        if isinstance(layer, nn.Dropout) and first < i < second:
            classifier[i] = ColumnDropout(layer.p, columns)
        elif isinstance(layer, nn.ReLU):
            layer.inplace = False  # the output of a split layer is a view that must not be changed in place
    if gather:
        classifier.register_forward_pre_hook(partial(_gather_rows, workers))
        classifier.register_forward_hook(partial(_own_rows, workers))
    return {
        f"{index}.{name}": shard
        for index, layer in ((first, column), (second, row))
        for name, shard in layer.shards.items()
    }


class _Gathered(torch.autograd.Function):
    """Gathers the rows of all workers. Backward, each worker takes the gradient of its own rows.

    The layers in front of it are data parallel, so their gradients are averaged over the workers. The factor
    makes a sum of that average.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.gather(mine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.own(gradients[0]) * ctx.workers.count, None


class _Own(torch.autograd.Function):
    """Keeps this worker's rows. Backward, the gradients of all workers' rows are gathered.

    The training step scales each worker's loss by the number of workers, for gradients that are averaged. The
    gradients of a split classifier are not averaged, so the factor is removed here.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.own(whole).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.gather(gradients[0].contiguous()) / ctx.workers.count, None


def _gather_rows(workers: Workers, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Gather the classifier's input from all workers."""
    workers.count_rows(len(inputs[0]))
    gathered: Tensor = _Gathered.apply(inputs[0], workers)
    return (gathered,)


def _own_rows(workers: Workers, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Keep the scores of this worker's rows."""
    own: Tensor = _Own.apply(output, workers)
    return own


def _shard(whole: Tensor, mine: TensorShard) -> nn.Parameter:
    # A copy, because a view would keep the whole tensor in memory.
    return nn.Parameter(mine.of(whole.detach()).clone(memory_format=torch.contiguous_format))


def _begin(traffic: Traffic, size: float, _: Any) -> None:
    traffic.sent(size)
    traffic.begin()


def _end(traffic: Traffic, _: Any) -> None:
    traffic.end()
