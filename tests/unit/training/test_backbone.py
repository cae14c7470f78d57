"""Networks trained whole: rates of their stages, and what is refused."""

from __future__ import annotations

import pytest

from cvdist import config as configs
from cvdist import models, recipes
from cvdist.config import ModelConfig, OptimizerConfig
from cvdist.errors import UserError
from cvdist.models import InputSpec
from cvdist.training.optimizer import build_optimizer, set_learning_rate


def test_each_stage_has_a_lower_rate_than_the_next():
    model = models.skeleton(
        ModelConfig(name="resnet18", weights="none", head="linear"), 3, InputSpec(3, 64, 64)
    )
    modules = models.frozen_and_trained(model)
    chosen = OptimizerConfig(
        layer_decay=0.5, backbone_lr_scale=0.1, weight_decay=0.3, norm_weight_decay=0.2, bias_weight_decay=0.1
    )
    optimizer = build_optimizer(modules.trained, chosen, stages=modules.stages)
    set_learning_rate(optimizer, 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    rates = ["fc.weight", "layer4.1.conv2.weight", "layer3.0.conv1.weight", "layer2.0.conv1.weight"]
    assert [found[name][0] for name in rates] == pytest.approx([1, 0.05, 0.025, 0.0125])
    assert found["conv1.weight"][0] < found["layer2.0.conv1.weight"][0]
    decays = [found[name][1] for name in ("fc.weight", "fc.bias", "bn1.weight", "bn1.bias")]
    assert decays == [0.3, 0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": ""}, "would freeze layers that are random: name --weights"),
        ({"trainable_stages": 1}, "would freeze layers that are random: name --weights"),
        ({"trainable_stages": "most"}, "--trainable-stages is most: it takes all, or 0 or more"),
        ({"sync_bn": True, "compile": "default"}, "--sync-bn can't be combined with --compile"),
    ],
)
def test_from_scratch_all_stages_are_trained(changes, said):
    chosen = {"data": "photos", "model": "resnet18", "weights": "none", **changes}
    config = configs.replace(recipes.find("transfer"), **chosen)
    with pytest.raises(UserError, match=said):
        configs.check(config)
        models.find("resnet18").check_settings(config.model)
