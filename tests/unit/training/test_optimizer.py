"""Learning rates and optimizers."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from cvdist.config import OptimizerConfig
from cvdist.training.optimizer import build_optimizer
from cvdist.training.schedule import learning_rate

# ----------------------------------------------------------------------------------------------- optimiser


def test_schedule_by_hand():
    warm = OptimizerConfig(lr=0.4, lr_scheduler="cosine", lr_warmup_epochs=2.0)
    assert learning_rate(warm, 10, 0.0) == pytest.approx(0.004)
    assert learning_rate(warm, 10, 1.0) == pytest.approx(0.2)
    assert learning_rate(warm, 10, 2.0) == pytest.approx(0.4)
    assert learning_rate(warm, 10, 6.0) == pytest.approx(0.2)  # half of the cosine
    assert learning_rate(warm, 10, 10.0) == pytest.approx(0.0)
    assert learning_rate(warm, 2, 1.0) == pytest.approx(0.2)  # a run that is shorter than its warm-up
    assert learning_rate(warm, 2, 2.0) == pytest.approx(0.4)
    assert learning_rate(OptimizerConfig(lr=0.1), 10, 7.5) == 0.1


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"lr_scheduler": "step", "lr_step_size": 3}, lambda o: lr_scheduler.StepLR(o, 3)),
        ({"lr_scheduler": "exponential", "lr_gamma": 0.8}, lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
        ({"lr_scheduler": "polynomial", "lr_power": 0.9}, lambda o: lr_scheduler.PolynomialLR(o, 10, 0.9)),
        ({"lr_scheduler": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, 10)),
        ({"lr_scheduler": "constant"}, lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0)),
    ],
)
@pytest.mark.parametrize("warm", [0, 2])
def test_rates_at_the_beginning_of_epochs_are_pytorchs(settings, theirs, warm):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler, rates = theirs(optimizer), []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    chosen = OptimizerConfig(lr=0.4, lr_warmup_epochs=float(warm), **settings)
    found = [learning_rate(chosen, 10 + warm, float(warm + epoch)) for epoch in range(11)]
    assert found == pytest.approx(rates, abs=1e-12)
    between = learning_rate(chosen, 10 + warm, warm + 3.5)
    assert rates[4] <= between <= rates[3]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_are_not_decayed(name):
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimizerConfig(name=name, weight_decay=0.5, lr=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(layer.weight)] == 0.5
    assert decay[id(layer.bias)] == 0.0
