"""Learning rates and optimizers."""

from __future__ import annotations

import pytest
import torch

from cvdist.config import OptimizerConfig
from cvdist.training.optimizer import build_optimizer, set_learning_rate
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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_are_not_decayed(name):
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimizerConfig(name=name, weight_decay=0.5, lr=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(layer.weight)] == 0.5
    assert decay[id(layer.bias)] == 0.0


def test_sgd_step_by_hand():
    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(weight.weight, 1.0)
    optimizer = build_optimizer(weight, OptimizerConfig(lr=0.1, momentum=0.5))
    set_learning_rate(optimizer, 0.1)
    for _ in range(2):  # the gradient is 2 each time: 1 - 0.1 * 2 = 0.8, then 0.8 - 0.1 * (2 + 0.5 * 2)
        optimizer.zero_grad()
        weight(torch.tensor([[2.0]])).sum().backward()
        optimizer.step()
    assert weight.weight.item() == pytest.approx(0.5)
