"""Mixtures of pictures: what torchvision makes, and the same for any number of workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from cvdist.data.dataset import Batch
from cvdist.data.mixing import Mixing, Mixture
from cvdist.data.sampler import EpochOrder
from tests.unit.data.test_data import make_loader

SHARES = [0.0, 0.03, 0.4, 0.75, 1.0]


def rolled(images, labels):
    """The samples of a whole batch as one worker loads them: the last one precedes the first."""
    rows = torch.arange(-1, len(labels)) % len(labels)
    return Batch(images[rows], labels[rows], rows, len(labels))


def batch(height=12, width=18):
    random = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, height, width, generator=random), torch.randint(5, (7,), generator=random)


@pytest.mark.parametrize("share", SHARES)
def test_mixup_is_torchvisions(share):
    transform = v2.MixUp(num_classes=5)
    transform._dist = SimpleNamespace(sample=lambda _: share)
    mixed = Mixing(1.0, 0.0, 5, seed=0).mix(rolled(*batch()), Mixture(share, None))
    images, labels = transform(*batch())
    assert torch.equal(mixed.images, images) and torch.equal(mixed.labels, labels)
    assert mixed.indices.tolist() == list(range(7))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("x", "y"), [(0, 0), (9, 5), (17, 11), (3, 9)])
def test_cutmix_is_torchvisions(monkeypatch, share, x, y):
    transform = v2.CutMix(num_classes=5)
    transform._dist = SimpleNamespace(sample=lambda _: share)
    numbers = iter([x, y])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(numbers)]))
    images, labels = batch_ = (torch.arange(7 * 3 * 12 * 18.0).view(7, 3, 12, 18), torch.arange(7) % 5)
    cut = ((x + 0.5) / 18, (y + 0.5) / 12)
    mixed = Mixing(0.0, 1.0, 5, seed=0).mix(rolled(*batch_), Mixture(share, cut))
    images, labels = transform(images, labels)
    assert torch.equal(mixed.images, images)
    torch.testing.assert_close(mixed.labels, labels)


@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_any_number_of_workers_makes_the_same_mixtures(size, batch_size, world, done, cut):
    loader = make_loader(size, 3, mixing=Mixing(0.4, 1.0 if cut else 0.0, 3, seed=1))
    order = EpochOrder(size, batch_size, seed=0, epoch=2)
    position = min(done * batch_size, size)
    alone = list(loader.train_batches(order, 0, 1))[-order.steps(position) :] if position < size else []
    parts = [list(loader.train_batches(order, rank, world, position)) for rank in range(world)]
    assert len(alone) == len(parts[0])
    for one, *others in zip(alone, *parts, strict=True):
        assert torch.equal(one.images, torch.cat([part.images for part in others]))
        assert torch.equal(one.labels, torch.cat([part.labels for part in others]))
        assert one.indices.tolist() == torch.cat([part.indices for part in others]).tolist()
        torch.testing.assert_close(one.labels.sum(1), torch.ones(len(one.labels)))


def test_draws_depend_on_seed_epoch_and_batch_and_take_turns():
    mixing = Mixing(0.2, 1.0, 3, seed=0)
    drawn = [mixing.draw(1, start) for start in range(0, 32_000, 32)]
    assert len(set(drawn)) == 1000 and drawn == [mixing.draw(1, start) for start in range(0, 32_000, 32)]
    assert mixing.draw(2, 0) != drawn[0] != Mixing(0.2, 1.0, 3, seed=1).draw(1, 0)
    blends = [one.share for one in drawn if one.cut is None]
    cuts = torch.tensor([one.share for one in drawn if one.cut is not None])
    assert 450 < len(blends) < 550
    # Beta(a, a) has the mean 1/2 and the variance 1 / (8 a + 4).
    assert torch.tensor(blends).var().item() == pytest.approx(1 / 5.6, rel=0.1)
    assert cuts.var().item() == pytest.approx(1 / 12, rel=0.1)
    assert all(one.cut is None for one in (Mixing(1.0, 0.0, 3, 0).draw(1, start) for start in range(50)))
