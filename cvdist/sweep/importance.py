"""How much each of the searched settings matters for the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvdist.sweep.record import Trial
from cvdist.sweep.space import Dimension

_LEAST_TRIALS = 8
_TREES, _REPEATS = 100, 20


@dataclass(frozen=True)
class Importance:
    """Importance of each setting, by a model that predicts a trial's accuracy from its settings.

    Attributes:
        flags: The settings as flags, the most important first.
        drops: Mean drop of the model's R² when the values of the setting are shuffled over the trials.
        spreads: Standard deviation of that drop.
        explained: R² of the model on trials that it was not fitted to (out of bag); 1 at best.
        trials: Number of trials.
        epochs: Number of epochs after which the accuracy was taken.
    """

    flags: tuple[str, ...]
    drops: tuple[float, ...]
    spreads: tuple[float, ...]
    explained: float
    trials: int
    epochs: int


def permutation_importance(
    search: Sequence[Dimension], trials: Sequence[Trial], epochs: int
) -> Importance | None:
    """Compute the permutation importance of each setting in a random forest.

    The method is that of section 10 of Breiman 2001, "Random Forests". A setting with choices is one-hot
    encoded, and its columns are shuffled together. If a trial does not have a setting, the setting counts as
    its lowest value.

    Args:
        search: The searched settings.
        trials: The trials.
        epochs: The forest predicts the validation accuracy after this many epochs. It should be a number that
            all trials have reached, since later accuracies are known only for the better trials.

    Returns:
        The importance, or None if there are fewer than 8 trials or all of them are equally good.
    """
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    measured = [(trial, found) for trial in trials if (found := trial.after(epochs)) is not None]
    target = np.array([found.correct / found.total for _, found in measured])
    if len(measured) < _LEAST_TRIALS or np.ptp(target) == 0:
        return None
    columns: list[np.ndarray] = []
    owners: list[int] = []
    for number, dimension in enumerate(search):
        values = [trial.settings.get(dimension.name) for trial, _ in measured]
        if dimension.choices:
            encoded = [[float(value == choice) for value in values] for choice in dimension.choices]
        else:
            encoded = [[dimension.fraction_of(value) if value is not None else 0.0 for value in values]]
        columns += [np.array(column) for column in encoded]
        owners += [number] * len(encoded)
    inputs = np.stack(columns, axis=1)
    forest = RandomForestRegressor(
        _TREES, min_samples_leaf=2, bootstrap=True, oob_score=True, random_state=0, n_jobs=1
    ).fit(inputs, target)
    total = ((target - target.mean()) ** 2).sum()

    def explained(features: np.ndarray) -> float:
        return float(1 - ((target - forest.predict(features)) ** 2).sum() / total)

    baseline, random = explained(inputs), np.random.default_rng(0)
    drops = []
    for number in range(len(search)):
        own = [at for at, owner in enumerate(owners) if owner == number]
        falls = []
        for _ in range(_REPEATS):
            shuffled = inputs.copy()
            shuffled[:, own] = inputs[random.permutation(len(inputs))][:, own]
            falls.append(baseline - explained(shuffled))
        drops.append((float(np.mean(falls)), float(np.std(falls))))
    order = sorted(range(len(search)), key=lambda number: -drops[number][0])
    return Importance(
        tuple(search[number].flag for number in order),
        tuple(drops[number][0] for number in order),
        tuple(drops[number][1] for number in order),
        float(forest.oob_score_),
        len(measured),
        epochs,
    )
