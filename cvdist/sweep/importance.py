"""Which of the searched settings matter for the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvdist.sweep.record import Trial
from cvdist.sweep.space import Dimension

_LEAST_TRIALS = 8
_TREES, _REPEATS = 100, 20


@dataclass(frozen=True)
class Importance:
    """How much worse a model of the accuracy becomes without each setting.

    flags: the settings, the most important first; drops: by how much R² falls when the setting's values are
    shuffled over the trials, the mean; spreads: its standard deviation; explained: R² of the model on trials
    that it has not learned from, 1 at best; trials: how many; epochs: after how many epochs accuracy was taken.
    """

    flags: tuple[str, ...]
    drops: tuple[float, ...]
    spreads: tuple[float, ...]
    explained: float
    trials: int
    epochs: int


def of(search: Sequence[Dimension], trials: Sequence[Trial], epochs: int) -> Importance | None:
    """Permutation importance in a random forest (Breiman, "Random Forests", 2001, section 10).

    What is explained is the validation accuracy after `epochs` epochs, which all trials have reached: later
    ones are known of the better trials only. A choice is as many columns as it has values, which are shuffled
    together; a setting that a trial does not have counts as the lowest. None with fewer than 8 trials, or where
    all are equally good.
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
            made = [[float(value == choice) for value in values] for choice in dimension.choices]
        else:
            made = [[dimension.fraction_of(value) if value is not None else 0.0 for value in values]]
        columns += [np.array(column) for column in made]
        owners += [number] * len(made)
    inputs = np.stack(columns, axis=1)
    forest = RandomForestRegressor(
        _TREES, min_samples_leaf=2, bootstrap=True, oob_score=True, random_state=0, n_jobs=1
    ).fit(inputs, target)
    total = ((target - target.mean()) ** 2).sum()

    def explained(of: np.ndarray) -> float:
        return float(1 - ((target - forest.predict(of)) ** 2).sum() / total)

    whole, random = explained(inputs), np.random.default_rng(0)
    drops = []
    for number in range(len(search)):
        mine = [at for at, owner in enumerate(owners) if owner == number]
        falls = []
        for _ in range(_REPEATS):
            shuffled = inputs.copy()
            shuffled[:, mine] = inputs[random.permutation(len(inputs))][:, mine]
            falls.append(whole - explained(shuffled))
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
