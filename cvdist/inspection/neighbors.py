"""Exact nearest neighbors among all pictures, in blocks of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048
"""Rows of a block: two blocks of 1,280 features and their products take 38 MB in float32."""


@dataclass(frozen=True)
class Neighbors:
    """The nearest neighbors of n pictures, the nearest first.

    Attributes:
        similarity: Cosine similarity in the space of the features minus their mean, float32 (n, k); -inf where
            there are fewer neighbors than k.
        index: Row of each neighbor, int64 (n, k); -1 where there are fewer.
    """

    similarity: Tensor
    index: Tensor


def nearest(
    features: Tensor,
    labels: Tensor,
    k: int,
    *,
    block: int = BLOCK,
    after_block: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Neighbors, Neighbors]:
    """Find the k nearest neighbors of each picture, among all others and among the others of its class.

    Each pair of blocks is multiplied once. Memory is bounded: besides `features`, the result and two blocks.

    Args:
        features: (n, d) of any floating dtype; computed in float32, on their device.
        labels: int64 (n,).
        k: Number of neighbors.
        block: Rows of a block.
        after_block: Called after each product with the number of products done and of all.

    Returns:
        The neighbors among all others, and among those of the same class.
    """
    count = len(features)
    mean = torch.stack([part.float().sum(0) for part in features.split(block)]).sum(0) / max(count, 1)
    labels = labels.to(features.device)
    anywhere, own = _Best(count, k, features.device), _Best(count, k, features.device)
    starts = range(0, count, block)
    done, products = 0, len(starts) * (len(starts) + 1) // 2
    for number, first in enumerate(starts):
        rows = _unit(features[first : first + block], mean)
        for second in starts[number:]:
            columns = rows if second == first else _unit(features[second : second + block], mean)
            similarity = rows @ columns.T
            if second == first:
                similarity.fill_diagonal_(-torch.inf)
            same = labels[first : first + block, None] == labels[None, second : second + block]
            for best, values in ((anywhere, similarity), (own, similarity.masked_fill(~same, -torch.inf))):
                best.add(first, second, values)
                if second != first:
                    best.add(second, first, values.T.contiguous())
            done += 1
            after_block(done, products)
    return anywhere.found(), own.found()


def _unit(features: Tensor, mean: Tensor) -> Tensor:
    """Return features minus their mean, scaled to length 1, float32; zeros where they equal the mean."""
    return torch.nn.functional.normalize(features.float() - mean)


class _Best:
    """The neighbors of all rows that have been found so far."""

    def __init__(self, count: int, k: int, device: torch.device) -> None:
        self._similarity = torch.full((count, k), -torch.inf, device=device)
        self._index = torch.full((count, k), -1, device=device)

    def add(self, first: int, second: int, similarity: Tensor) -> None:
        """Take from a block of similarities, of rows from `first` on to rows from `second` on."""
        kept = self._similarity[first : first + len(similarity)]
        better = (similarity.amax(1) > kept[:, -1]).nonzero().flatten()
        if not len(better):
            return
        k = kept.shape[1]
        values, places = similarity[better].topk(min(k, similarity.shape[1]))
        rows = better + first
        values = torch.cat([self._similarity[rows], values], 1)
        places = torch.cat([self._index[rows], places + second], 1)
        values, order = values.topk(k)
        self._similarity[rows], self._index[rows] = values, places.gather(1, order)

    def found(self) -> Neighbors:
        """Return the neighbors, on the CPU."""
        self._index[self._similarity == -torch.inf] = -1
        return Neighbors(self._similarity.cpu(), self._index.cpu())
