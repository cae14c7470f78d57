"""The real MNIST, whole and damaged."""

from __future__ import annotations

import pytest
import torch

from cvdist import config as configs
from cvdist import recipes
from cvdist.errors import UserError
from cvdist.loaders import open_loader

CPU = torch.device("cpu")


def mnist(folder):
    return configs.replace(recipes.find("mnist-cnn"), data=str(folder))


def test_mnist_is_complete_and_normalized_by_its_own_mean_and_deviation(shared_data):
    loader = open_loader(mnist(shared_data / "mnist"), CPU)
    assert (loader.info.train_size, loader.info.valid_size) == (60_000, 10_000)
    pixels = loader.splits["train"].images.double() / 255
    assert round(pixels.mean().item(), 4) == loader.info.mean[0] == 0.1307
    assert round(pixels.std().item(), 4) == loader.info.std[0] == 0.3081


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_mnist_is_named(shared_data, tmp_path, damage):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (shared_data / "mnist" / "MNIST" / "raw").glob("*ubyte"):
        (raw / file.name).write_bytes(file.read_bytes())
    images = raw / "train-images-idx3-ubyte"
    content = images.read_bytes()
    images.write_bytes(content[:1_000_000] if damage == "truncated" else bytes(len(content)))
    with pytest.raises(UserError, match=r"MNIST/raw/train-\S+ is (truncated or )?damaged"):
        open_loader(mnist(tmp_path), CPU)
