from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cvdist import config as configs
from cvdist import recipes
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import DatasetInfo
from cvdist.data.in_memory import InMemoryLoader, LabeledImages
from cvdist.data.sampler import EpochOrder
from cvdist.data.split import stratified_split
from cvdist.loaders import open_loader

CPU = torch.device("cpu")


def make_loader(train: int, valid: int, size: int = 6, channels: int = 1, **options) -> InMemoryLoader:
    generator = torch.Generator().manual_seed(0)

    def part(count):
        images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
        return LabeledImages(images, torch.arange(count) % 3)

    info = DatasetInfo(
        "test",
        "made up",
        ("a", "b", "c"),
        channels,
        size,
        size,
        (0.4,) * channels,
        (0.2,) * channels,
        train,
        valid,
    )
    return InMemoryLoader(info, part(train), part(valid), device=CPU, **options)


# ------------------------------------------------------------------------------------------------ in memory


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 5), st.integers(0, 80))
def test_batches_are_the_order_normalized(train, batch_size, world, position):
    loader = make_loader(train, 5)
    position = position // batch_size * batch_size
    order = EpochOrder(train, batch_size, seed=1, epoch=1)
    for rank in range(world):
        shares = list(order.local_batches(rank, world, position))
        got = list(loader.train_batches(order, rank, world, position))
        assert [batch.indices.tolist() for batch in got] == [local.indices.tolist() for local in shares]
        for batch, local in zip(got, shares, strict=True):
            raw = loader.splits["train"].images[local.indices]
            expected = (raw.float() / 255 - 0.4) / 0.2
            torch.testing.assert_close(batch.images, expected)
            assert batch.labels.tolist() == (local.indices % 3).tolist()
            assert batch.global_size == local.global_size


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 6))
def test_validation_reads_each_sample_once(valid, batch_size, world):
    loader = make_loader(3, valid)
    rows = [
        row
        for rank in range(world)
        for batch in loader.valid_batches(rank, world, batch_size)
        for row in batch.indices.tolist()
    ]
    assert rows == list(range(valid))


def test_pictures_are_the_original_pixels():
    loader = make_loader(10, 4)
    images, names = loader.pictures("train", [7, 2])
    assert torch.equal(images, loader.splits["train"].images[[7, 2]])
    assert names == ["b", "c"]
    assert loader.pictures("valid", [])[0].shape == (0, 1, 6, 6)


def test_digest_notices_a_changed_pixel_and_a_changed_label():
    loaders = [make_loader(10, 4) for _ in range(4)]
    loaders[1].splits["valid"].images[3, 0, 5, 5] ^= 1
    loaders[2].splits["train"].labels[0] = 2
    digests = [loader.digest() for loader in loaders]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@given(st.integers(1, 5), st.integers(1, 3))
def test_augmentation_does_not_depend_on_workers_or_interruptions(world, stopped_after):
    augmentation = Augmentation(0.5, 20.0, 0.1, seed=3)
    loader = make_loader(40, 4, augmentation=augmentation)
    order = EpochOrder(40, 8, seed=0, epoch=2)
    alone = torch.cat([batch.images for batch in loader.train_batches(order, 0, 1)])
    parts = [list(loader.train_batches(order, rank, world)) for rank in range(world)]
    together = torch.cat([batch.images for step in zip(*parts, strict=True) for batch in step])
    torch.testing.assert_close(together, alone)
    rest = torch.cat([batch.images for batch in loader.train_batches(order, 0, 1, stopped_after * 8)])
    torch.testing.assert_close(rest, alone[stopped_after * 8 :])
    another_epoch = next(iter(loader.train_batches(EpochOrder(40, 8, seed=0, epoch=3), 0, 1)))
    assert not torch.equal(another_epoch.images, alone[:8])


def test_validation_is_not_augmented():
    plain, augmented = make_loader(4, 9), make_loader(4, 9, augmentation=Augmentation(1.0, 90.0, 0.5, seed=0))
    for one, other in zip(plain.valid_batches(0, 1, 4), augmented.valid_batches(0, 1, 4), strict=True):
        assert torch.equal(one.images, other.images)


# -------------------------------------------------------------------------------------------------- digits


@given(st.lists(st.integers(0, 4), min_size=60, max_size=200), st.integers(0, 9))
def test_stratified_split_is_a_partition_in_proportion(labels, seed):
    tensor = torch.tensor(labels)
    train, valid = stratified_split(tensor, 0.4, seed)
    assert sorted(train.tolist() + valid.tolist()) == list(range(len(labels)))
    for label in tensor.unique():
        whole, part = (tensor == label).sum().item(), (tensor[valid] == label).sum().item()
        assert abs(part - 0.4 * whole) < 1 and (part > 0 or whole == 1)


def test_digits_are_balanced_real_and_split_by_their_own_seed():
    loader = open_loader(recipes.find("digits-cnn"), CPU)
    assert (loader.info.train_size, loader.info.valid_size) == (4000, 1000)
    _, names = loader.pictures("valid", range(1000))
    assert {names.count(str(digit)) for digit in range(10)} == {100}
    other_run = open_loader(configs.replace(recipes.find("digits-cnn"), seed=5), CPU)
    assert other_run.digest() == loader.digest()
    other_split = open_loader(configs.replace(recipes.find("digits-cnn"), split_seed=5), CPU)
    assert other_split.digest() != loader.digest()
    ones = next(i for i, name in enumerate(names) if name == "1")
    picture = loader.pictures("valid", [ones])[0][0, 0]
    assert picture.max() > 200 and (picture == 0).float().mean() > 0.5  # white ink on black
