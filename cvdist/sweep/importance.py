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
    encoded. If a trial does not have a setting, the setting counts as its lowest value.

    Args:
        search: The searched settings.
        trials: The trials.
        epochs: The forest predicts the validation accuracy after this many epochs. It should be a number that
            all trials have reached, since later accuracies are known only for the better trials.

    Returns:
        The importance, or None if there are fewer than 8 trials or all of them are equally good.
    """
    import numpy as np
    from sklearn import inspection
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    measured = [(trial, found) for trial in trials if (found := trial.after(epochs)) is not None]
    target = np.array([found.correct / found.total for _, found in measured])
    if len(measured) < _LEAST_TRIALS or np.ptp(target) == 0:
        return None
    columns = [
        [
            0.0 if (value := trial.settings.get(one.name)) is None else one.fraction_of(value)
            for trial, _ in measured
        ]
        for one in search
    ]
    inputs = np.array(columns).T
    forest = RandomForestRegressor(_TREES, min_samples_leaf=2, oob_score=True, random_state=0)
    choices = [column for column, one in enumerate(search) if one.choices]
    # One column for each choice: without them, a choice between two others goes unnoticed.
    encoder = make_column_transformer((OneHotEncoder(), choices), remainder="passthrough", sparse_threshold=0)
    model = make_pipeline(encoder, forest).fit(inputs, target)
    drops = inspection.permutation_importance(model, inputs, target, n_repeats=_REPEATS, random_state=0)
    order = np.argsort(-drops.importances_mean, kind="stable")
    return Importance(
        tuple(search[column].flag for column in order),
        tuple(drops.importances_mean[order].tolist()),
        tuple(drops.importances_std[order].tolist()),
        float(forest.oob_score_),
        len(measured),
        epochs,
    )
