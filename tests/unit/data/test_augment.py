"""What augmentation does to pictures."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import v2

from cvdist.data.augment import Augmentation
from cvdist.data.sampler import EpochOrder, LocalBatch

# ----------------------------------------------------------------------------------------------- augmentation


def photo(height=40, width=50):
    return torch.rand(6, 3, height, width, generator=torch.Generator().manual_seed(3)) * 255


def draws_of(augmentation, count=6):
    share = next(EpochOrder(count, count, seed=0, epoch=1).local_batches(0, 1))
    return augmentation.draw(share, 1)


def test_crops_show_a_part_of_the_asked_size():
    """On a picture whose values are its coordinates a crop shows where it was taken from."""
    x = torch.linspace(-1, 1, 101)[:-1] + 0.01
    columns, rows = x.expand(100, 100), x[:, None].expand(100, 100)
    images = torch.stack([columns, rows, columns]).repeat(500, 1, 1, 1)
    augmentation = Augmentation(random_resized_crop=0.25)
    moved = augmentation.apply(images, draws_of(augmentation, 500))
    width = (moved[:, 0, 50, 75] - moved[:, 0, 50, 25]) / (x[75] - x[25])
    height = (moved[:, 1, 75, 50] - moved[:, 1, 25, 50]) / (x[75] - x[25])
    area = width * height
    assert 0.249 < area.min() < 0.3 and 0.9 < area.max() <= 1.01
    assert 0.61 < area.mean() < 0.64  # uniform from a quarter to the whole
    assert 0.749 < (width / height).min() < 0.8 and 1.25 < (width / height).max() < 1.334
    inside = moved[:, :2].flatten(1)
    assert inside.min() >= -1 and inside.max() <= 1  # never beyond the border, so nothing is black


@pytest.mark.parametrize("ratio", [1.0, 1.2, 2.0])
def test_crops_are_of_the_asked_proportions(ratio):
    augmentation = Augmentation(random_resized_crop=0.1, crop_ratio=ratio)
    width, height, *_ = augmentation._crops(torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)))
    sides = width / height
    assert 1 / ratio - 1e-5 < sides.min() < 1 / ratio + 0.02 and ratio - 0.02 < sides.max() < ratio + 1e-5


@pytest.mark.parametrize("size", [(24, 30), (224, 224)])
def test_erasing_is_torchvisions(monkeypatch, size):
    """Given the numbers that it draws; torchvision draws again where ours is cut by the border."""
    augmentation = Augmentation(random_erase=0.7)
    images, draws, compared = torch.rand(40, 3, *size) * 255, draws_of(augmentation, 40), 0
    erased = augmentation.apply(images.clone(), draws, (0.2, 0.4, 0.6))
    for image, mine, (chosen, *numbers) in zip(images, erased, draws[:, -6:-1].double().tolist(), strict=True):
        if chosen >= 0.7:
            assert torch.equal(image, mine)
            continue
        drawn = iter(numbers)

        def uniform(low, high, drawn=drawn):
            return torch.tensor(float(low + (high - low) * next(drawn)))

        transform = v2.RandomErasing(p=1, value=(51.0, 102.0, 153.0))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda _, uniform=uniform: SimpleNamespace(uniform_=uniform))
            patch.setattr(torch, "randint", lambda _, n, d=drawn, **__: torch.tensor(int(n * next(d))))
            with suppress(StopIteration):  # it would draw again
                params = transform.make_params([image])
                compared += 1
                torch.testing.assert_close(transform.transform(image, params), mine)
    assert compared > 20


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("ra", v2.RandAugment),
        ("ta_wide", v2.TrivialAugmentWide),
        ("augmix", v2.AugMix),
        ("imagenet", v2.AutoAugment),
    ],
)
def test_policies_are_torchvisions(name, policy, channels):
    """Given the numbers that a seed of each picture gives; what is drawn afterwards, as by dropout, stays."""
    augmentation = Augmentation(auto_augment=name)
    images, draws = photo().round()[:, :channels], draws_of(augmentation)
    torch.manual_seed(5)
    found, after = augmentation.apply(images.clone(), draws), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    transform = policy(interpolation=v2.InterpolationMode.BILINEAR)
    for image, seed, mine in zip(images, draws[:, -1], found, strict=True):
        torch.manual_seed(int(seed * 2**24))
        assert (
            torch.equal(transform(image.to(torch.uint8)), mine.to(torch.uint8)) and mine.dtype == images.dtype
        )
    assert not torch.equal(found, images)
    part = augmentation.apply(images[2:4].clone(), draws[2:4])
    assert torch.equal(part, found[2:4])


def test_one_more_kind_of_augmentation_leaves_the_others_as_they_are():
    plain, more = Augmentation(0.5, 10, 0.1), Augmentation(0.5, 10, 0.1, color_jitter=1e-6)
    expected = plain.apply(photo(), draws_of(plain))
    torch.testing.assert_close(more.apply(photo(), draws_of(more)), expected, rtol=0, atol=1e-2)


def test_color_changes_by_up_to_the_factor():
    gray = torch.full((400, 3, 4, 4), 100.0)
    augmentation = Augmentation(color_jitter=0.2)
    changed = augmentation.apply(gray, draws_of(augmentation, 400))
    # A picture of one gray has neither contrast nor color: only brightness changes it.
    assert 80 <= changed.min() < 82 and 118 < changed.max() <= 120.01
    images = photo()
    changed = augmentation.apply(images, draws_of(augmentation))
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 255
    assert not torch.equal(changed, images)
    assert Augmentation(color_jitter=0.2).apply(photo()[:0], draws_of(augmentation)[:0]).shape[0] == 0


# --------------------------------------------------------------------------------------------- augmentation


def augment(images, draws, **settings):
    # The others, of crops and colors, must not matter.
    return Augmentation(**settings).apply(images.clone(), torch.tensor([[*draws, *torch.rand(13)]]))


def test_flip_mirrors_exactly_with_and_without_resampling():
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(augment(images, [0.0, 0.5, 0.5, 0.5], horizontal_flip=1.0), images.flip(-1))
    resampled = augment(images, [0.0, 0.5, 0.5, 0.5], horizontal_flip=1.0, rotation=10.0)
    torch.testing.assert_close(resampled, images.flip(-1))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 36)])
def test_rotation_is_in_degrees_and_keeps_shapes(height, width):
    images = torch.zeros(1, 1, height, width)
    images[..., height // 4 : -height // 4, width // 4 : -width // 4] = 255
    images[..., height // 4 : height // 2, width // 4 : width // 2] = 100
    ours = augment(images, [0.5, 1.0, 0.5, 0.5], rotation=15.0)
    # Positive angles are clockwise here, counter-clockwise in torchvision.
    candidates = [
        v2.functional.rotate(images, angle, interpolation=v2.InterpolationMode.BILINEAR)
        for angle in (15.0, -15.0)
    ]
    assert min((ours - other).abs().mean().item() for other in candidates) < 1.0
    assert (ours - images).abs().mean() > 5


def test_translation_moves_by_the_fraction_and_fills_with_black():
    images = torch.full((1, 1, 10, 10), 7.0)
    moved = augment(images, [0.5, 0.5, 1.0, 0.5], translation=0.2)  # looks up 2 pixels to the right
    torch.testing.assert_close(moved[..., :8], images[..., :8])
    assert moved[..., 8:].abs().max() < 1e-4


def test_flip_probability_is_met():
    augmentation = Augmentation(horizontal_flip=0.3)
    draws = augmentation.draw(LocalBatch(torch.arange(20_000), 0, 0, 20_000), epoch=1)
    images = torch.arange(2.0).repeat(20_000, 1)[:, None, None]
    flipped = (augmentation.apply(images, draws)[:, 0, 0, 0] == 1).float().mean()
    assert abs(flipped - 0.3) < 0.02


def test_parts_of_a_large_batch_are_augmented_as_a_small_batch_is():
    augmentation = Augmentation(
        horizontal_flip=0.5, rotation=10.0, random_resized_crop=0.3, color_jitter=0.2, random_erase=0.5
    )
    images, draws = torch.rand(10, 3, 224, 224) * 255, draws_of(augmentation, 10)  # 6 MB
    one_by_one = [
        augmentation.apply(image, draw) for image, draw in zip(images.split(1), draws.split(1), strict=True)
    ]
    assert torch.equal(augmentation.apply(images.clone(), draws), torch.cat(one_by_one))
