"""Odd pictures: what is listed, and what so many have that it is usual."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cvdist.inspection import odd
from cvdist.inspection.neighbors import nearest


def measures(count=200, **changes):
    usual = {"width": 400.0, "height": 300.0, "brightness": 0.5, "contrast": 0.2, "border": 0.0}
    found = {name: np.full(count, value) for name, value in usual.items()}
    for name, values in changes.items():
        for row, value in values.items():
            found[name][row] = value
    return found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("blank", {"contrast": {7: 0.001}, "border": {7: 1.0}, "brightness": {7: 0.01}}),
        ("dark", {"brightness": {7: 0.02}}),
        ("bright", {"brightness": {7: 0.99}}),
        ("tiny", {"width": {7: 40}, "height": {7: 30}}),
        ("aspect", {"width": {7: 1500}}),
        ("border", {"border": {7: 0.6}}),
    ],
)
def test_each_kind_is_found_alone(kind, changes):
    found, usual = odd.measured(measures(**changes))
    assert [(one.kind, one.rows) for one in found] == [(kind, [7])] and not usual
    assert found[0].notes[0] and not odd.measured(measures())[0]


def test_what_many_have_is_usual():
    found, usual = odd.measured(measures(border=dict.fromkeys(range(100), 0.5), brightness={3: 0.01}))
    assert [one.kind for one in found] == ["dark"]
    assert usual == ["50% of the pictures are mostly a border of one color: usual here, and not listed"]


def test_far_from_its_class():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(300, 16, generator=random)
    labels = torch.arange(300) % 2
    features[labels == 1, 0] += 20
    features[10] = features[labels == 1].mean(0) + 0.1 * torch.randn(16, generator=random)  # of the other class
    features[20:25] = 60 * torch.eye(16)[5] + torch.randn(5, 16, generator=random)  # of none, and alike
    _, own = nearest(features, labels, 8)
    found = odd.far_from_class(own, labels)
    assert {*found.rows[:6]} == {10, *range(20, 25)} and found.scores == sorted(found.scores, reverse=True)
    assert len(found.rows) < 15
    assert found.of_rows(list(range(1000, 1300))).rows[0] == found.rows[0] + 1000


def test_a_measure_that_tells_a_class():
    random = np.random.default_rng(0)
    labels = np.arange(200) % 4
    values = measures() | {"brightness": random.random(200)}
    assert odd.shortcuts(values, labels, 4) == []
    values["border"] = np.where(labels == 2, 0.3, 0.0) + 0.01 * random.random(200)
    (found,) = odd.shortcuts(values, labels, 4)
    assert (found.measure, found.label, found.higher) == ("border", 2, True)
    # The area under the curve is the share of pairs in the right order.
    mine, others = values["border"][labels == 2], values["border"][labels != 2]
    assert found.area == pytest.approx((mine[:, None] > others[None]).mean())
