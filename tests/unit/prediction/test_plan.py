"""How pictures are cut into slices, and made grey."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cvdist.prediction import plan
from cvdist.prediction.predict import to_gray

# ------------------------------------------------------------------------------------------------- slices


def listing_of(paths):
    columns = {"path": paths, "size": [1] * len(paths), "modified": [1] * len(paths)}
    return pa.table(columns, schema=pa.schema([("path", "string"), ("size", "int64"), ("modified", "int64")]))


@given(st.sets(st.text("abc/", min_size=1, max_size=8), min_size=1, max_size=300), st.integers(1, 40))
def test_slices_hold_every_picture_once_in_order(paths, size):
    cut = plan.work_units(listing_of(sorted(paths)), {}, size)
    assert [path for one in cut for path in one.paths] == sorted(paths)
    assert max(len(one.paths) for one in cut) <= 2 * size
    assert all(len(one.paths) >= size // 2 for one in cut[:-1])
    assert len({one.key for one in cut}) == len(cut)


def test_a_picture_that_comes_or_goes_changes_few_slices():
    paths = [f"{i:06}.jpg" for i in range(20_000)]
    before = {one.key for one in plan.work_units(listing_of(paths), {}, 100)}
    assert 150 < len(before) < 250
    for changed in (["000000.a.jpg", *paths], paths[1:], [*paths[:9000], "008999.x.jpg", *paths[9000:]]):
        after = {one.key for one in plan.work_units(listing_of(sorted(changed)), {}, 100)}
        assert len(after - before) <= 5
    assert not before & {one.key for one in plan.work_units(listing_of(paths), {"model": "other"}, 100)}


def test_grey_is_pillows_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    ours = to_gray(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0, 0].numpy()
    theirs = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    assert np.abs(ours - theirs).max() <= 1 and (ours == theirs).mean() > 0.99
