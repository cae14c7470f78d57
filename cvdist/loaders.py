"""Opens the data that a configuration names, pictures or cached features, for the training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cvdist.config import DataConfig, MixingConfig, TrainConfig, storage_root
from cvdist.data import digits, images, mnist
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import Loader
from cvdist.data.images.exclusion import read_paths
from cvdist.data.images.listing import list_pictures
from cvdist.data.in_memory import InMemoryLoader
from cvdist.data.labels import is_multilabel
from cvdist.data.mixing import Mixing
from cvdist.errors import UserError
from cvdist.features import open as features


def prepare(config: TrainConfig) -> None:
    """Do what the data needs once per node, such as downloading or decoding; called by one worker of each.

    Raises:
        UserError: if the data is missing or can't be used.
    """
    if config.features.uri:
        features.prepare(config)
    elif config.data.dataset == "images":
        images.prepare(config)
    else:
        prepare_in_memory(config.data, config.run.storage)


def check(config: TrainConfig) -> bool:
    """Check that the data is there and can be used, without decoding pictures.

    Returns:
        Whether a picture may have several classes.

    Raises:
        UserError: if the data is missing or can't be used.
    """
    if config.data.exclude:
        read_paths(config.data.exclude)
    if config.data.dataset == "images" and not config.features.uri:
        multilabel = is_multilabel(list_pictures(config.data).table)
    else:
        prepare(config)
        multilabel = bool(config.features.uri) and features.open_manifest(config)[1].multilabel
    check_labels(config, multilabel=multilabel)
    return multilabel


def check_labels(config: TrainConfig, *, multilabel: bool) -> None:
    """Refuse settings that make no sense for pictures with one class each, or with several.

    Raises:
        UserError: one line that names the flag.
    """
    chosen = config.loop.select_by
    if chosen == ("balanced_accuracy" if multilabel else "mean_average_precision"):
        each = "may have several classes" if multilabel else "have one class each"
        usual = "mean_average_precision" if multilabel else "accuracy"
        raise UserError(f"--select-by {chosen}: these pictures {each}, so take {usual}, macro_f1 or loss")
    if multilabel and config.loop.balanced_sampling:
        raise UserError(
            "--balanced-sampling is for pictures with one class each, these may have several: use "
            "--class-weights balanced"
        )


def prepare_in_memory(data: DataConfig, storage: str) -> None:
    """Bring digits or MNIST onto this node; `storage`: as `RunConfig.storage`.

    Raises:
        UserError: if they can't be downloaded.
    """
    if data.dataset == "mnist":
        mnist.fetch(_folder(data, storage))


def open_loader(
    config: TrainConfig,
    device: torch.device,
    *,
    workers_on_node: int = 1,
    normalization: images.Normalization | None = None,
) -> Loader:
    """Open the configured data set on `device`.

    Args:
        config: configuration that names the data and how it is read.
        device: device of the batches.
        workers_on_node: number of workers that share this node's cores.
        normalization: mean and standard deviation by channel, for pixels in [0, 1], instead of the data's own.

    Raises:
        UserError: if the data set is missing or damaged.
    """
    if config.features.uri:
        return features.load(config, device, workers_on_node)
    if config.data.dataset == "images":
        return images.load(config, device, workers_on_node, normalization)
    return open_in_memory(
        config.data,
        config.run.storage,
        device,
        seed=config.run.seed,
        augmentation=config.augmentation,
        channels_last=config.loop.channels_last,
        normalization=normalization,
    )


def open_in_memory(
    data: DataConfig,
    storage: str,
    device: torch.device,
    *,
    seed: int = 0,
    augmentation: MixingConfig | None = None,
    channels_last: bool = True,
    normalization: images.Normalization | None = None,
) -> InMemoryLoader:
    """Open digits or MNIST on `device`.

    Args:
        data: configuration that names the data set and its split.
        storage: as `RunConfig.storage`.
        device: device of the batches.
        seed: seed of the augmentation and of mixtures.
        augmentation: settings of augmentation and mixtures of training pictures; None for neither.
        channels_last: memory layout NHWC for the batches.
        normalization: mean and standard deviation by channel, for pixels in [0, 1], instead of the data's own.

    Raises:
        UserError: if the data set is missing or damaged.
    """
    if data.dataset == "mnist":
        info, train, valid = mnist.load(_folder(data, storage))
    else:
        info, train, valid = digits.load(data)
    if normalization is not None and info.channels == len(normalization[0]):
        info = dataclasses.replace(info, mean=normalization[0], std=normalization[1])
    changes = augmentation or MixingConfig()
    return InMemoryLoader(
        info,
        train,
        valid,
        device=device,
        augmentation=Augmentation.from_config(changes, seed),
        mixing=Mixing.from_config(changes, len(info.classes), seed),
        channels_last=channels_last,
    )


def _folder(data: DataConfig, storage: str) -> Path:
    if data.uri:
        return Path(data.uri).expanduser().resolve()
    root = storage_root(storage)
    if "://" in root:
        raise UserError("--data is needed: the storage is a URI, and the data set has to be in a folder")
    return Path(root) / "data"
