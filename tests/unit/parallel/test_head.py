"""Which classifiers can be split, and what compressed gradients weigh."""

from __future__ import annotations

import pytest
from torch import nn

from cvdist.errors import UserError
from cvdist.parallel.head import linear_layers
from cvdist.parallel.modes import powersgd_bytes


@pytest.mark.parametrize(
    ("classifier", "workers", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), 2, "this model has 1: leave it out, or choose a VGG with --head vgg"),
        (nn.Identity(), 2, "this model has 0"),
        (nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2)), 2, "needs all columns at once"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
            3,
            "the 4 columns .* too few for 3 workers",
        ),
    ],
)
def test_what_can_not_be_split_is_one_line(classifier, workers, message):
    with pytest.raises(UserError, match=message):
        linear_layers(classifier, workers)


def test_powersgd_compresses_what_gets_smaller():
    assert powersgd_bytes((4096, 25088), 4) == 4 * 4 * (4096 + 25088)
    assert powersgd_bytes((2, 4096), 4) == 4 * 2 * 4096 and powersgd_bytes((4096,), 4) == 4 * 4096
