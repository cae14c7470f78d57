"""The data that a configuration names, pictures or cached features, ready for the training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cvdist.config import TrainConfig, storage_root
from cvdist.data import digits, images, mnist
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import Loader
from cvdist.data.in_memory import InMemoryLoader
from cvdist.errors import UserError
from cvdist.features import open as features


def prepare(config: TrainConfig) -> None:
    """Bring the data onto this node where that has to happen once a node: call it on one worker of each.

    Raises:
        UserError: if the data can't be had.
    """
    if config.features.features:
        features.prepare(config)
    elif config.data.dataset == "mnist":
        mnist.fetch(_folder(config))
    elif config.data.dataset == "images":
        images.prepare(config)


def open_loader(
    config: TrainConfig,
    device: torch.device,
    *,
    workers_on_node: int = 1,
    normalisation: images.Normalisation | None = None,
) -> Loader:
    """The configured data set, on `device`.

    workers_on_node: how many share this node's cores; normalisation: mean and standard deviation by channel,
    for pixels in [0, 1], instead of the data's own.

    Raises:
        UserError: if it is missing or damaged.
    """
    if config.features.features:
        return features.load(config, device, workers_on_node)
    if config.data.dataset == "images":
        return images.load(config, device, workers_on_node, normalisation)
    if config.data.dataset == "mnist":
        info, train, valid = mnist.load(_folder(config))
    else:
        info, train, valid = digits.load(config.data)
    if normalisation is not None and info.channels == len(normalisation[0]):
        info = dataclasses.replace(info, mean=normalisation[0], std=normalisation[1])
    return InMemoryLoader(
        info,
        train,
        valid,
        device=device,
        augmentation=Augmentation.from_config(config.data, config.loop.seed),
        channels_last=config.loop.channels_last,
    )


def _folder(config: TrainConfig) -> Path:
    if config.data.data:
        return Path(config.data.data).expanduser().resolve()
    root = storage_root(config)
    if "://" in root:
        raise UserError("--data is needed: the storage is a URI, and the data set has to be in a folder")
    return Path(root) / "data"
