"""Which pictures are one, and which of them is kept."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import ImageOps

from cvdist.data.images.decode import decode
from cvdist.inspection import copies
from cvdist.inspection.alignment import SIDE, correlation
from cvdist.inspection.copies import MIRRORED, NEAR, SAME_BYTES, SAME_PIXELS, Pair
from cvdist.inspection.neighbors import Neighbors
from tests.helpers.pictures import scene


def shown(picture, quality=92):
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return decode(content.getvalue(), SIDE, "squash")


def cropped(picture, left, top, right, bottom):
    width, height = picture.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return picture.crop(tuple(map(round, box)))


VARIANTS = {
    "re-encoded": lambda picture: shown(picture, 60),
    "half": lambda picture: shown(picture.resize((picture.width // 2, picture.height // 2))),
    "cropped around": lambda picture: shown(cropped(picture, 0.025, 0.025, 0.025, 0.025)),
    "cropped more": lambda picture: shown(cropped(picture, 0.05, 0.05, 0.05, 0.05)),
    "cropped at a corner": lambda picture: shown(cropped(picture, 0.08, 0.05, 0, 0)),
    "brighter": lambda picture: shown(picture.point(lambda value: 0.8 * value + 30)),
    "mirrored": lambda picture: shown(ImageOps.mirror(picture)),
    "mirrored and cropped": lambda picture: shown(ImageOps.mirror(cropped(picture, 0, 0.05, 0.05, 0))),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_picture_is_recognized(name):
    pictures = [scene(seed) for seed in range(6)]
    pairs = [(i, i + 100) for i in range(6)]
    plain, changed = (torch.stack([make(one) for one in pictures]) for make in (shown, VARIANTS[name]))
    for first, second in ((plain, changed), (changed, plain)):
        found = copies.compare(pairs, first, second)
        assert [(pair.first, pair.second) for pair in found] == pairs
        assert {pair.how for pair in found} == {MIRRORED if "mirrored" in name else NEAR}
        assert all(0.85 <= pair.score <= 1 for pair in found)


def test_other_pictures_are_not():
    pictures = torch.stack([shown(scene(seed)) for seed in range(16)])
    pairs = [(i, j) for i in range(16) for j in range(i)]
    assert not copies.compare(pairs, *(pictures[[pair[side] for pair in pairs]] for side in (0, 1)))
    # Equal pixels are one picture, whatever they show; else one of one color is like no other.
    blank = torch.full((1, SIDE, SIDE, 3), 200, dtype=torch.uint8)
    assert copies.compare([(0, 1)], blank, blank)[0].how == SAME_PIXELS
    assert not copies.compare([(0, 1)], blank, blank - 1) and not copies.compare([(0, 1)], blank, pictures[:1])


def test_correlation_stays_within_its_bounds():
    random = torch.Generator().manual_seed(0)
    values = correlation(*(torch.rand(50, SIDE, SIDE, generator=random) for _ in range(2)))
    assert values.isfinite().all() and values.abs().max() <= 1 + 1e-5


def test_candidates_are_looked_at_until_many_in_a_row_are_none():
    pictures = torch.stack([shown(scene(seed)) for seed in range(4)])
    seen = []

    def look(rows):
        seen.extend(rows)
        return pictures[[row % 4 for row in rows]]

    # Row i is the same picture as row i + 4; among 2,000 other pairs that one would not be reached.
    pairs = [(0, 4), *((0, 5 + 4 * i) for i in range(2000)), (1, 5)]
    found = copies.verify(np.array(pairs), look)
    assert [(pair.first, pair.second, pair.how) for pair in found] == [(0, 4, SAME_PIXELS)]
    assert len(seen) < 1000


def test_candidates_come_once_and_the_most_similar_first():
    similarity = torch.tensor([[0.9, 0.2], [0.9, 0.5], [0.5, -torch.inf]])
    index = torch.tensor([[1, 2], [0, 2], [1, -1]])
    assert copies.candidates(Neighbors(similarity, index)).tolist() == [[0, 1], [1, 2], [0, 2]]


def test_what_is_kept_of_a_group():
    assert copies.same_bytes([b"a", b"b", b"a", b"a"]) == [Pair(0, n, SAME_BYTES, 1.0) for n in (2, 3)]
    pairs = [Pair(0, 1, NEAR, 0.97), Pair(1, 4, SAME_BYTES, 1.0), Pair(2, 3, MIRRORED, 0.99)]
    valid, pixels = np.array([False, False, False, False, True]), np.array([9.0, 5.0, 1.0, 2.0, 3.0])
    found = {(one.row, one.twin, one.how, one.score) for one in copies.to_leave_out(pairs, valid, pixels)}
    # A picture to validate on stays; of two to learn from, the larger one.
    assert found == {(0, 4, NEAR, 0.97), (1, 4, SAME_BYTES, 1.0), (2, 3, MIRRORED, 0.99)}
