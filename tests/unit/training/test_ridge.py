"""The ridge probe: the right weights and penalty, the same at any number of workers, told where results are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist.training.ridge import Equations, Sums, pooled, solve
from tests.helpers import feature_caches

CPU = torch.device("cpu")


def made_up(count, inputs, classes, seed=0):
    """Inputs (n, d), far from 0, of which the first few tell the class, and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    x = torch.randn(count, inputs, generator=random, dtype=torch.float64) + 50
    x[:, : min(inputs, classes)] += torch.nn.functional.one_hot(labels, classes)[:, :inputs]
    return x, labels


def sums_of(x, labels, classes):
    sums = Sums.zero(x.shape[1], classes, CPU)
    sums.add(x, labels)
    return sums


def by_hand(x, labels, classes, penalty):
    """Weights, bias and generalized cross-validation score, from the definitions, with the whole hat matrix."""
    x, t = x.numpy(), np.eye(classes)[labels.numpy()]
    n, centered = len(x), x - x.mean(0)
    inverse = np.linalg.inv(centered.T @ centered + penalty * np.eye(x.shape[1]))
    weight = inverse @ centered.T @ (t - t.mean(0))
    hat = centered @ inverse @ centered.T + np.full((n, n), 1 / n)
    score = ((t - hat @ t) ** 2).sum() / n / ((n - np.trace(hat)) / n) ** 2
    return weight, t.mean(0) - x.mean(0) @ weight, score


@pytest.mark.parametrize(("count", "inputs", "classes"), [(200, 12, 3), (30, 50, 2), (40, 5, 4)])
def test_weights_and_penalty_are_those_of_the_definitions(count, inputs, classes):
    x, labels = made_up(count, inputs, classes)
    fit = solve(sums_of(x, labels, classes))
    weight, bias, _ = by_hand(x, labels, classes, fit.penalty)
    np.testing.assert_allclose(fit.weight, weight, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fit.bias, bias, rtol=1e-6, atol=1e-6)
    centered = x - x.mean(0)
    grid = np.logspace(-4, 3, 15) * float(centered.square().sum()) / inputs
    best = min(grid, key=lambda penalty: by_hand(x, labels, classes, penalty)[2])
    assert fit.penalty == pytest.approx(best)


def left_out_by_hand(x, labels, classes, penalty):
    """How many pictures are right, and the squared error, with a classifier of its own without each picture."""
    right, error = 0, 0.0
    for row in range(len(x)):
        others = torch.arange(len(x)) != row
        weight, bias, _ = by_hand(x[others], labels[others], classes, penalty)
        scores = x[row].numpy() @ weight + bias
        right += int(scores.argmax()) == int(labels[row])
        error += ((np.eye(classes)[labels[row]] - scores) ** 2).sum()
    return right, error


@pytest.mark.parametrize(("count", "inputs", "classes"), [(40, 6, 3), (20, 30, 2), (12, 3, 5)])
def test_leaving_one_out_is_fitting_without_each_picture(count, inputs, classes):
    """Also with more inputs than pictures, and for the only picture of a class."""
    x, labels = made_up(count, inputs, classes)
    labels[labels == classes - 1] = 0
    labels[0] = classes - 1
    equations = Equations.of(sums_of(x, labels, classes))
    found = equations.leave_one_out((x[rows], labels[rows]) for rows in torch.arange(count).split(7))
    tried = {penalty: left_out_by_hand(x, labels, classes, penalty) for penalty in equations.penalties.tolist()}
    assert (found.correct, found.total) == (tried[found.penalty][0], count)
    assert found.error == pytest.approx(tried[found.penalty][1])
    best = min(tried, key=lambda penalty: (-tried[penalty][0], tried[penalty][1]))
    assert found.penalty == best


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 60), max_size=4))
def test_sums_over_parts_are_the_sums(cuts):
    x, labels = made_up(60, 7, 3)
    whole, parts = sums_of(x, labels, 3), Sums.zero(7, 3, CPU)
    for rows in torch.arange(60).tensor_split(sorted(cuts)):
        parts.add(x[rows], labels[rows])
    for name in ("squares", "products", "inputs", "targets", "count"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("same", [True, False], ids=["all alike", "one class"])
def test_what_cannot_be_learned_still_gives_finite_weights(same):
    x, labels = made_up(10, 4, 2)
    x, labels = (x[:1].expand(10, 4), labels) if same else (x, torch.zeros(10, dtype=torch.int64))
    fit = solve(sums_of(x, labels, 2))
    assert fit.weight.isfinite().all() and fit.bias.isfinite().all()
    found = Equations.of(sums_of(x, labels, 2)).leave_one_out([(x, labels)])
    assert math.isfinite(found.error) and 0 <= found.correct <= 10


def test_pooling():
    features = torch.arange(24.0).view(1, 2, 3, 4)
    assert pooled(features).tolist() == [[5.5, 17.5, 11.0, 23.0]]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A cache of two classes that differ in their colors, and a configuration to train from it."""
    return feature_caches.two_colors(tmp_path_factory.mktemp("ridge"))


@pytest.mark.parametrize("workers", [2, 3, 20])
def test_any_number_of_workers_adds_up_to_the_same_sums(chosen, workers):
    """Also more workers than pictures."""
    loader = feature_caches.loader(chosen)
    sums = []
    for world_size in (1, workers):
        total = Sums.zero(2 * loader.feature_shape[0], 2, CPU)
        for rank in range(world_size):
            for batch in loader.batches_in_order("train", rank, world_size, 4):
                total.add(pooled(batch.images), batch.labels)
        sums.append(total)
    assert sums[0].count == sums[1].count == 17
    torch.testing.assert_close(sums[0].squares, sums[1].squares)
