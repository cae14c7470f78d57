"""One cache serves all heads."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from cvdist import config as configs
from cvdist.config import SavedModelConfig
from cvdist.errors import UserError
from cvdist.jobs.train import train
from cvdist.saved import open_model
from tests.helpers import feature_caches, pictures


def test_one_cache_serves_all_heads_and_models_are_rebuilt_with_theirs(tmp_path):
    pictures.write(tmp_path / "pictures", {f"{part}/{name}": 4 for part in ("train", "valid") for name in "ab"})
    weights = feature_caches.write_weights(tmp_path / "weights.pth")
    chosen = feature_caches.config(
        tmp_path / "pictures", tmp_path / "features", weights, tmp_path / "cache", storage=str(tmp_path)
    )
    feature_caches.extract(chosen)  # made with the usual head
    chosen = configs.replace(
        chosen, runtime="inline", tracking="required", system_metrics=False, visualize=False, hidden_size=8
    )
    train(configs.replace(chosen, name="mlp", head="mlp"))
    probe = configs.replace(chosen, name="probe", head="linear", hidden_size=0, tracking="none")
    train(probe)
    for name, size in (("mlp", ("mlp", 8)), ("probe", ("linear", 0))):
        saved = open_model(SavedModelConfig(source=str(tmp_path / name)))
        assert (saved.identity.head, saved.identity.hidden_size) == size
        assert saved.model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
        frozen = torch.load(weights, weights_only=True)
        assert all(torch.equal(saved.model.state_dict()[key], tensor) for key, tensor in frozen.items())
    logged = open_model(SavedModelConfig(source="mlp", storage=str(tmp_path)))
    assert logged.digest == open_model(SavedModelConfig(source=str(tmp_path / "mlp"))).digest
    assert logged.identity.hidden_size == 8
    # Another head can't go on from it, and is told so.
    shutil.copytree(tmp_path / "mlp", tmp_path / "other")
    with pytest.raises(
        UserError, match=re.escape("of model vgg11, mlp head of 8 hidden units on maps (2 classes")
    ):
        train(configs.replace(probe, name="other"))
