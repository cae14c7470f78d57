"""A cache of features and a training from it, with networks of different kinds, in this process."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import get_model

from cvdist import config as configs
from cvdist import models, recipes
from cvdist.config import ModelConfig, PreprocessConfig, SavedModelConfig
from cvdist.features import manifest
from cvdist.jobs.preprocess import preprocess, table
from cvdist.jobs.train import train
from cvdist.saved import open_model
from cvdist.storage import Folder
from tests.helpers import pictures

SIDE = 64


def write_weights(path, name):
    """Random weights in a small file: the rows of each matrix are windows that overlap in one storage."""
    values = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) * 0.05
    network = models.skeleton(ModelConfig(name=name, head="linear"), 1000)

    def filled(key, tensor):
        if tensor.ndim < 2:
            return torch.full(tensor.shape, float(key.endswith(("weight", "var")))).to(tensor.dtype)
        return values.as_strided(tensor.shape, (7, *torch.empty(tensor.shape[1:], device="meta").stride()))

    torch.save({key: filled(key, tensor) for key, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def photos(module_path):
    return pictures.write(module_path / "pictures", {"train/a": 8, "train/b": 8, "valid/a": 3, "valid/b": 3})


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "vit_b_32"])
def test_from_pictures_to_a_network_of_torchvision(name, photos, tmp_path):
    recipe = recipes.find(
        "transfer-features",
        model=name,
        weights=str(write_weights(tmp_path / "weights.pth", name)),
        image_size=SIDE,
        features=str(tmp_path / "features"),
        precision="float32",
    )
    asked = configs.replace(
        PreprocessConfig.of(recipe), data=str(photos), runtime="inline", features_dtype="float32", device="cpu"
    )
    made = preprocess(asked)
    cache = manifest.read(Folder.open(str(tmp_path / "features"), "--features"))
    inputs = models.skeleton(recipe.model).get_submodule(
        models.frozen_and_trained(models.skeleton(recipe.model)).head
    )
    assert cache.feature_shape == (inputs.in_features,)
    # 256 pixels for a crop of 224 are 73 for one of 64.
    assert (cache.fingerprint.size, cache.fingerprint.resize) == (SIDE, "crop:73:bilinear")
    flags = f"--image-size 64 --resize crop:73:bilinear --model {name}"
    assert f"transfer-features --features {tmp_path}/features {flags}" in table(made)
    trained = train(
        configs.replace(
            recipe,
            runtime="inline",
            tracking="none",
            storage=str(tmp_path),
            name="run",
            device="cpu",
            epochs=2,
            batch_size=8,
            cache=str(tmp_path / "cache"),
        )
    )
    assert trained.summary.best.valid_total == 6
    saved = open_model(SavedModelConfig(source=str(tmp_path / "run")))
    assert (saved.identity.name, saved.identity.head, saved.learned_resize()) == (
        name,
        "linear",
        "crop:73:bilinear",
    )
    own = get_model(name, num_classes=2, **({"image_size": SIDE} if name.startswith("vit") else {})).eval()
    own.load_state_dict(saved.model.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(own(images), saved.model(images), rtol=1e-3, atol=1e-2)
