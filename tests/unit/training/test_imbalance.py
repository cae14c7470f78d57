"""Class weights, what is told of imbalance, and when a training ends early."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvdist.checkpoints.format import Progress
from cvdist.config import LoopConfig
from cvdist.data.sampler import EpochOrder
from cvdist.errors import UserError
from cvdist.results import EpochRecord, balanced_accuracy, macro_f1
from cvdist.training import imbalance
from cvdist.training.early_stopping import reason

NAMES = ("cat", "dog", "eel")


def labels(*counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def weights(chosen, counts=(6, 3, 1), **more):
    found = imbalance.class_weights(LoopConfig(class_weights=chosen, **more), NAMES, labels(*counts))
    return None if found is None else found.tolist()


def test_weights_are_those_of_scikit_learn_or_as_given_with_a_mean_of_one():
    assert weights("none") is None
    assert weights("balanced") == pytest.approx([10 / 18, 10 / 9, 10 / 3])  # samples / (classes * count)
    assert weights("dog=2,eel=4.5") == pytest.approx([x * 10 / 16.5 for x in (1, 2, 4.5)])
    # Balanced sampling draws each class equally often.
    assert weights("dog=2", balanced_sampling=True) == pytest.approx([0.75, 1.5, 0.75])
    assert weights("balanced", counts=(2, 0, 2))[::2] == [1, 1]


@pytest.mark.parametrize(
    ("chosen", "said"), [("dgo=2", r"'dgo'.* did you mean dog\?"), ("dog=0", "a weight is a number above 0")]
)
def test_weights_that_make_no_sense_are_one_line(chosen, said):
    with pytest.raises(UserError, match=said):
        weights(chosen)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 4), st.integers(0, 99))
def test_the_weights_of_global_batches_are_known_without_asking_other_workers(size, batch_size, done, seed):
    mine = torch.randint(3, (size,), generator=torch.Generator().manual_seed(seed))
    order = EpochOrder(size, batch_size, seed=seed, epoch=1)
    position = min(done * batch_size, size)
    each = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    found = list(imbalance.batch_weights(each, mine, order, position))
    batches = [local.indices for local in order.local_batches(0, 1, position)]
    assert found == [each[mine[rows]].sum().item() for rows in batches]
    assert list(imbalance.batch_weights(None, mine, order, position)) == [len(rows) for rows in batches]


def test_counts_are_short_and_imbalance_is_said():
    plain = LoopConfig()
    assert imbalance.describe(NAMES, labels(3, 1200, 7)) == "dog 1,200, eel 7, cat 3"
    assert imbalance.describe(range(100), labels(*[1500] * 100)) == "100 classes of 1,500 pictures each"
    many = imbalance.describe([f"c{i}" for i in range(1000)], labels(*range(1, 1001)))
    assert many == "1,000 classes, from c999 with 1,000 pictures to c0 with 1"
    assert imbalance.warning(plain, NAMES, labels(3, 29, 7)) == ""
    assert imbalance.warning(plain, NAMES, labels(3, 30, 7)).startswith("dog has 30 pictures, cat 3, so")
    done = dataclasses.replace(plain, balanced_sampling=True)
    assert imbalance.warning(done, NAMES, labels(3, 30, 7)) == ""


def test_metrics_in_which_all_classes_count_alike_by_hand():
    confusion = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])
    assert balanced_accuracy(confusion) == pytest.approx((8 / 10 + 1 / 2) / 2)
    assert macro_f1(confusion) == pytest.approx((16 / 19 + 2 / 5) / 2)


# ------------------------------------------------------------------------------------------- early stopping


def history(*values, select_by="accuracy"):
    plain = EpochRecord(1, 1.0, 1, 1, 0.0, 0, 1000, 0.1, 1.0, 1.0, select_by=select_by)
    records = []
    for epoch, value in enumerate(values, start=1):
        loss, correct = (value, 0) if select_by == "loss" else (0.0, round(1000 * value))
        records.append(dataclasses.replace(plain, epoch=epoch, valid_loss=loss, valid_correct=correct))
    return Progress(epoch=len(values), history=records)


@pytest.mark.parametrize(
    ("values", "min_delta", "stops"),
    [
        ((0.5, 0.6, 0.6), 0.0, False),
        ((0.5, 0.6, 0.6, 0.4), 0.0, True),
        ((0.5, 0.6, 0.59, 0.61), 0.0, False),
        ((0.5, 0.6, 0.59, 0.61), 0.02, True),
        ((0.5, 0.51, 0.52, 0.53), 0.02, False),  # better than the first one by more, at last
        ((0.5,), 0.0, False),
    ],
)
def test_patience_counts_epochs_without_a_better_value(values, min_delta, stops):
    settings = LoopConfig(patience=2, min_delta=min_delta)
    said = reason(history(*values), settings)
    assert bool(said) == stops
    assert not reason(history(*values), dataclasses.replace(settings, patience=0))
    # Nothing is stopped early in its last epoch.
    assert not reason(history(*values), dataclasses.replace(settings, epochs=len(values)))


def test_a_lower_loss_is_better():
    settings = LoopConfig(patience=2, min_delta=0.01, select_by="loss")
    assert not reason(history(0.9, 0.8, 0.7, select_by="loss"), settings)
    said = reason(history(0.7, 0.695, 0.8, select_by="loss"), settings)
    assert said == "stopped early after epoch 3: no better loss by more than 0.01 in 2 epochs"
    scores = [
        record.score for record in history(float("nan"), 900.0, 0.7, 0.695, 0.7, select_by="loss").history
    ]
    assert scores.index(max(scores)) == 3 and min(scores) == scores[0] > -0.1
