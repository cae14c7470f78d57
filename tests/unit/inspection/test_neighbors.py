"""Nearest neighbors in blocks are those that one product of all rows gives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cvdist.inspection.neighbors import nearest


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 50), st.integers(0, 1000))
@settings(max_examples=60)
def test_blocks_give_what_one_product_gives(count, k, block, seed):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 8, generator=random)
    labels = torch.randint(3, (count,), generator=random)
    unit = normalize(features - features.mean(0))
    everything = (unit @ unit.T).fill_diagonal_(-torch.inf)
    own = everything.masked_fill(labels[:, None] != labels[None], -torch.inf)
    done = []
    for found, similarity in zip(
        nearest(features, labels, k, block=block, after_block=lambda *step: done.append(step)),
        (everything, own),
        strict=True,
    ):
        expected = similarity.topk(min(k, count), 1).values
        torch.testing.assert_close(found.similarity[:, : min(k, count)], expected, atol=1e-5, rtol=0)
        there = expected > -torch.inf
        assert torch.equal(found.index[:, : min(k, count)] >= 0, there)
        # Of equally near ones, any.
        seen = similarity.gather(1, found.index.clamp(min=0)[:, : min(k, count)])
        torch.testing.assert_close(seen[there], expected[there], atol=1e-5, rtol=0)
        assert (found.index[:, min(k, count) :] == -1).all()
    blocks = -(-count // block)
    assert done[-1] == (blocks * (blocks + 1) // 2,) * 2


def test_half_precision_is_computed_in_single():
    features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.zeros(30, dtype=torch.int64)
    for half, single in zip(nearest(features, labels, 3), nearest(features.float(), labels, 3), strict=True):
        assert torch.equal(half.index, single.index) and torch.equal(half.similarity, single.similarity)
