"""The line of progress."""

from __future__ import annotations

import io

import pytest

from cvdist import log

TRAINING = "━━━━━━━·····  epoch 2/10  step 73/125  23 s left  loss 0.4371  accuracy 86.2%  1,414 samples/s"
FEATURES = "━━━━━━━·····  1,300 of 2,000 pictures, 82.9 images/s, about 8 s left"


@pytest.mark.parametrize(
    ("columns", "text", "shown"),
    [
        (100, TRAINING, TRAINING),
        (len(TRAINING), TRAINING, TRAINING.rpartition("  ")[0]),  # the last column stays empty
        (80, TRAINING, TRAINING.rpartition("  ")[0]),
        (70, TRAINING, TRAINING.partition("  accuracy")[0]),
        (60, FEATURES, FEATURES.rpartition(", ")[0]),
        (40, "one long word of a path: /" + "a" * 80, "one long word of a path: /" + "a" * 13),
    ],
)
def test_parts_of_a_line_without_room_are_left_out(monkeypatch, columns, text, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    log.overwrite(stream, text)
    assert stream.getvalue() == f"\r\x1b[K{shown}"
