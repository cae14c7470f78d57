"""Logistic regression: scikit-learn's optimum, the same at any number of workers, for inputs as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist.training import logistic_head
from cvdist.training.logistic import FOLDS, Part, assign_folds, fit, measure_scaling
from tests.helpers.logistic_workers import CLASSES, CPU, INPUTS, fitted, fitted_separable, made_up, parts


def solved(x, labels, classes, penalty, memory=1e9, **more):
    mine = parts(x, labels)
    return fit(
        *(lambda: mine, labels, classes, x.shape[1]),
        device=CPU,
        memory=memory,
        penalties=[penalty],
        tolerance=1e-12,
        **more,
    )


def reference(x, labels, classes, penalty, **more):
    """Weight and bias for inputs as they are, by scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x.numpy())
    c = (2 if classes == 2 else 1) / (penalty * len(x))
    model = LogisticRegression(C=c, tol=1e-9, max_iter=10_000, **more).fit(scaler.transform(x.numpy()), labels)
    weight = model.coef_ / scaler.scale_
    return weight, model.intercept_ - weight @ scaler.mean_, model, scaler


CASES = {
    "two classes": (200, 12, 2, {}),
    "ten classes": (400, 20, 10, {}),
    "more inputs than pictures": (60, 90, 3, {}),
    "separable": (100, 5, 3, {"signal": 30.0}),
    "a thousand classes": (1200, 4, 1000, {}),
    "one picture a class": (30, 8, 30, {}),
}


# A thousand classes with a small penalty take scikit-learn a minute.
@pytest.mark.parametrize(
    ("case", "penalty"), [(case, p) for case in CASES for p in (1.0, 1e-3) if CASES[case][2] < 1000 or p == 1]
)
def test_the_optimum_is_that_of_scikit_learn(case, penalty):
    from sklearn.metrics import log_loss

    count, inputs, classes, more = CASES[case]
    x, labels = made_up(count, inputs, classes, **more)
    found = solved(x, labels, classes, penalty)
    weight, bias, model, scaler = reference(x, labels, classes, penalty)
    ours, our_bias = found.weight.numpy(), found.bias.numpy()
    if classes == 2:
        ours, our_bias = ours[1:] - ours[:1], our_bias[1:] - our_bias[:1]
    np.testing.assert_allclose(ours, weight, rtol=1e-3, atol=1e-4 * abs(weight).max())
    # Biases have no penalty, so what is added to all of them is not determined.
    np.testing.assert_allclose(
        our_bias - our_bias.mean() * (classes > 2), bias - bias.mean() * (classes > 2), atol=5e-3
    )
    assert found.loss == pytest.approx(
        log_loss(labels, model.predict_proba(scaler.transform(x.numpy()))), rel=1e-5
    )
    predicted = (x @ found.weight.T + found.bias).argmax(1)
    assert int((predicted == labels).sum()) == found.correct


def test_class_weights_are_those_of_scikit_learn():
    x, labels = made_up(300, 8, 3, signal=0.5)
    kept = torch.cat([(labels == 0).nonzero(), (labels == 1).nonzero()[:30], (labels == 2).nonzero()[:9]])[:, 0]
    x, labels = x[kept], labels[kept]
    each = len(labels) / (3 * labels.bincount().double())
    found = solved(x, labels, 3, 0.01, class_weights=each)
    weight, bias, _, _ = reference(x, labels, 3, 0.01, class_weight="balanced")
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=1e-3, atol=1e-4 * abs(weight).max())
    np.testing.assert_allclose(found.bias - found.bias.mean(), bias - bias.mean(), atol=5e-3)
    assert (found.weight - solved(x, labels, 3, 0.01).weight).abs().max() > 0.1 * abs(weight).max()
    # Held-out pictures count as their classes do.
    mine = parts(x, labels)
    chosen = fit(lambda: mine, labels, 3, 8, device=CPU, memory=1e9, class_weights=each)
    assert sum(held.total for held in chosen.path) == len(labels) * len(chosen.path)


def test_constant_inputs_have_no_weight():
    x, labels = made_up()
    constant = torch.cat([x, torch.full((len(x), 1), 0.1), torch.zeros(len(x), 1)], dim=1)
    found, without = solved(constant, labels, CLASSES, 0.01), solved(x, labels, CLASSES, 0.01)
    assert not found.weight[:, INPUTS:].any()
    torch.testing.assert_close(found.weight[:, :INPUTS], without.weight, rtol=1e-4, atol=1e-6)


def test_a_class_without_pictures_is_never_predicted():
    x, labels = made_up()
    found = solved(x, labels, CLASSES + 1, 0.01)
    assert found.weight.isfinite().all() and found.bias.isfinite().all()
    assert (x @ found.weight.T + found.bias).argmax(1).max() < CLASSES


@settings(max_examples=50)
@given(st.integers(2, 6), st.integers(2, 4), st.integers(0, 1000), st.floats(0.01, 1000))
def test_folded_weights_do_on_inputs_what_the_others_do_standardized(inputs, classes, seed, spread):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(9, inputs, generator=random, dtype=torch.float64) * spread + 3 * spread
    x[:, 0] = spread  # constant
    labels = torch.zeros(9, dtype=torch.int64)
    scaling = measure_scaling(
        lambda: [Part(x[:4], labels[:4], labels, True), Part(x[4:], labels[4:], labels, True)], inputs, CPU
    )
    assert scaling.count == 9 and scaling.factor[0] == 0
    standardized = scaling.apply(x)
    torch.testing.assert_close(standardized.mean(0), torch.zeros(inputs, dtype=torch.float64))
    torch.testing.assert_close(
        standardized[:, 1:].std(0, correction=0), torch.ones(inputs - 1, dtype=torch.float64)
    )
    coefficients = torch.randn(inputs, classes, generator=random, dtype=torch.float64)
    bias = torch.randn(classes, generator=random, dtype=torch.float64)
    weight, folded = scaling.fold(coefficients, bias)
    torch.testing.assert_close(x @ weight.T + folded, standardized @ coefficients + bias)


def test_folds_are_stratified_and_follow_from_the_seed():
    _, labels = made_up(997, 2, 7)
    labels[0] = 7  # one picture
    folds = assign_folds(labels, 3)
    for label in range(7):
        sizes = folds[labels == label].bincount(minlength=FOLDS)
        assert sizes.max() - sizes.min() <= 1
    assert folds[0] == -1 and folds[1:].bincount(minlength=FOLDS).min() >= 199
    assert torch.equal(folds, assign_folds(labels, 3)) and not torch.equal(folds, assign_folds(labels, 4))


def test_the_penalty_is_the_one_of_cross_validation():
    """Held-out predictions are those of models that have not seen any view of the picture."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, labels = made_up()
    found, folds = fitted(views=1), assign_folds(labels, 0)
    scaled = StandardScaler().fit_transform(x.numpy())
    for held in found.path[:6]:
        correct = 0
        for fold in range(FOLDS):
            seen, out = (folds != fold).numpy(), (folds == fold).numpy()
            model = LogisticRegression(C=1 / (held.penalty * seen.sum()), tol=1e-6, max_iter=5000)
            model.fit(scaled[seen], labels[seen])
            correct += int((model.predict(scaled[out]) == labels.numpy()[out]).sum())
        assert held.correct == pytest.approx(correct, abs=2) and held.total == len(x)
    best = min(found.path, key=lambda held: held.loss)
    assert found.penalty == best.penalty and found.folds == FOLDS
    assert len(found.path) < 13  # what only gets worse is not tried


@pytest.mark.parametrize("several", [False, True])
def test_ties_between_penalties_go_to_the_strongest(several):
    """The held-out losses of separable samples are lower at each weaker penalty, by little at last."""
    found = fitted_separable(several=several)
    lowest = min(found.path, key=lambda held: held.loss)
    chosen = next(held for held in found.path if held.penalty == found.penalty)
    assert chosen.penalty > lowest.penalty and lowest.loss < chosen.loss < 2e-3
    assert all(held.loss > 2e-3 for held in found.path if held.penalty > chosen.penalty)


def test_samples_that_are_read_again_in_each_pass_give_the_same():
    kept, read = fitted(), fitted(memory=0)
    assert kept.penalty == read.penalty and kept.path == read.path
    assert torch.equal(kept.weight, read.weight)


def test_nothing_to_hold_out():
    """Each class has one picture, so there is no penalty to choose."""
    x, labels = made_up(CLASSES)
    found = fit(lambda: parts(x, labels), labels, CLASSES, INPUTS, device=CPU)
    assert (
        found.folds == 0
        and not found.path
        and found.correct == CLASSES
        and found.penalty == pytest.approx(0.01)
    )


@pytest.mark.parametrize(("layers", "found"), [(0, True), (1, True), (2, True), (1, False), (2, False)])
def test_a_head_with_hidden_layers_computes_what_a_linear_one_does(layers, found):
    torch.manual_seed(0)
    classes, inputs, width = 3, 5, 6 if found else 5  # two hidden units for each class
    modules, size = [], inputs
    for _ in range(layers):
        modules += [torch.nn.Linear(size, width), torch.nn.ReLU(), torch.nn.Dropout(0.5)]
        size = width
    trained = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Sequential(*modules, torch.nn.Linear(size, classes))
    )
    head = logistic_head.head_of(trained, classes)
    assert (head is not None) == found
    if head is None:
        return
    weight, bias, x = torch.randn(classes, inputs), torch.randn(classes), torch.randn(7, inputs, 1)
    with torch.no_grad():
        logistic_head.assign(head, weight, bias)
    torch.testing.assert_close(trained.eval()(x), torch.nn.functional.linear(x.flatten(1), weight, bias))
    # What is not needed can still learn.
    trained.train()(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.parameters())
    assert torch.equal(logistic_head.inputs_of(trained, head)(x), x.flatten(1))


def test_what_is_no_head_is_not_fitted():
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    other = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    assert logistic_head.head_of(convolutions, 2) is None and logistic_head.head_of(other, 2) is None
