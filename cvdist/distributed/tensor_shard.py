"""Which part of a tensor belongs to which worker."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """Rows `start` to `stop` along dimension `dim` of a tensor that is whole in `shape`."""

    dim: int
    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """This part of a tensor of that shape, as a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])


def part(size: int, workers: int, rank: int) -> range:
    """What is worker `rank`'s, as `torch.chunk` and DTensor cut: the last parts may be shorter or empty."""
    length = -(-size // workers)
    return range(min(rank * length, size), min((rank + 1) * length, size))


def cut(shape: tuple[int, ...], dim: int, workers: int, rank: int) -> TensorShard:
    """The slice of worker `rank`."""
    mine = part(shape[dim], workers, rank)
    return TensorShard(dim, mine.start, mine.stop, shape)
