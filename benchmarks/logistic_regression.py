"""Logistic regression with the choice of its penalty, against scikit-learn's on the same samples and folds.

Pooled features of MobileNetV2 are imitated: 1,280 inputs, some of which tell the class. Both sides standardize,
try the same penalties, and fit all samples with the best. Our side ends its path early, as it does in a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler

from benchmarks.harness import Comparison, compare
from cvdist.training import logistic

_INPUTS = 1280


def measure() -> Iterator[Comparison]:
    """Compare seconds for 1,600 and 25,000 pictures, on all cores."""
    for count, classes, pairs in ((1600, 2, 3), (25_000, 2, 1)):
        random = torch.Generator().manual_seed(0)
        labels = torch.randint(classes, (count,), generator=random)
        directions = 0.25 * torch.randn(classes, _INPUTS, generator=random)
        inputs = torch.randn(count, _INPUTS, generator=random) + directions[labels]
        inputs = inputs.relu() * torch.rand(_INPUTS, generator=random)
        rows = torch.arange(count)
        folds = logistic.assign_folds(labels, 0).numpy()
        held = range(logistic.FOLDS if count <= logistic.CROSS_VALIDATED else 1)
        splits = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in held]
        tried: list[float] = []

        def ours(
            inputs: torch.Tensor = inputs,
            labels: torch.Tensor = labels,
            rows: torch.Tensor = rows,
            tried: list[float] = tried,
            classes: int = classes,
        ) -> float:
            started = time.perf_counter()
            part = logistic.Part(inputs, labels, rows, first=True)
            found = logistic.fit(
                lambda: [part], labels, classes, _INPUTS, device=torch.device("cpu"), memory=1e10
            )
            tried[:] = [held.penalty for held in found.path]
            return time.perf_counter() - started

        def other(
            inputs: torch.Tensor = inputs,
            labels: torch.Tensor = labels,
            splits: list[tuple[np.ndarray, np.ndarray]] = splits,
            tried: list[float] = tried,
        ) -> float:
            started = time.perf_counter()
            scaled = StandardScaler().fit_transform(inputs.numpy())
            seen = len(splits[0][0])
            # As many penalties as our side tried; two classes have one weight vector there.
            strengths = [2 / (penalty * seen) for penalty in tried or logistic.PENALTIES[:8]]
            model = LogisticRegressionCV(
                Cs=strengths,
                cv=splits,
                max_iter=1000,
                l1_ratios=(0.0,),
                scoring="accuracy",
                use_legacy_attributes=False,
            )
            model.fit(scaled, labels.numpy())
            return time.perf_counter() - started

        yield compare(
            f"logistic regression, {count:,} x 1,280",
            ours,
            other,
            unit="s",
            target=1.0,
            pairs=pairs,
            at_most=True,
        )
