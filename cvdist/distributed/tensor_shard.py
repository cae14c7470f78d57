"""Which rows of a tensor each worker holds when the tensor is split over the workers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """One worker's shard of a tensor.

    Attributes:
        dim: The dimension along which the tensor is split.
        start: First index along `dim` that belongs to the shard.
        stop: One past its last index.
        shape: Shape of the whole tensor.
    """

    dim: int
    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """Return this shard of `whole`, which has the shape `shape`, as a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the shard."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])


def shard_range(size: int, workers: int, rank: int) -> range:
    """Return the indices out of `size` that belong to worker `rank`, cut as `torch.chunk` and DTensor cut.

    All shards have the same length but the last ones, which may be shorter or empty.
    """
    length = -(-size // workers)
    return range(min(rank * length, size), min((rank + 1) * length, size))


def shard_of(shape: tuple[int, ...], dim: int, workers: int, rank: int) -> TensorShard:
    """Return worker `rank`'s shard of a tensor of this shape, split along `dim` over `workers` workers."""
    mine = shard_range(shape[dim], workers, rank)
    return TensorShard(dim, mine.start, mine.stop, shape)
