"""The data set `images`: folders of photographs, on a disk or in object storage."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import torch

from cvdist.config import DataConfig, TrainConfig, cache_folder
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import DatasetInfo, Split
from cvdist.data.images import exclusion, store
from cvdist.data.images.listing import split_rows
from cvdist.data.images.loader import DecodingSource, ImageLoader, PixelFile, PixelSource
from cvdist.data.labels import is_multilabel
from cvdist.data.mixing import Mixing
from cvdist.hardware import usable_cores
from cvdist.log import redact

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

__all__ = ["ImageLoader", "as_split_in_training", "load", "prepare"]


def prepare(config: TrainConfig) -> None:
    """Decode all pictures once on this node, into the cache folder (`cvdist.data.images.store`).

    Raises:
        UserError: if pictures can't be read, are not sorted into class folders, or too many can't be decoded.
    """
    runtime = config.runtime
    store.prepare(
        config.data,
        cache_folder(config.data.cache),
        timeout=runtime.prepare_timeout,
        data_timeout=runtime.data_timeout,
    )


def as_split_in_training(config: DataConfig, *, timeout: float, data_timeout: float) -> dict[Split, pa.Table]:
    """Split data that has no splits of its own, and return the pictures of both, as columns path and label.

    The split depends on the contents of all pictures that can be decoded, so all of them are decoded, unless
    this node has done so before.

    Args:
        config: configuration that names the pictures.
        timeout: seconds to wait for another process that is decoding them.
        data_timeout: seconds that a chunk of pictures may take.

    Raises:
        UserError: as `prepare`.
    """
    cache = cache_folder(config.cache)
    store.prepare(config, cache, timeout=timeout, data_timeout=data_timeout)
    there = store.open_picture_store(config, cache)
    train, valid = split_rows(there.table, config, there.classes)
    return {"train": there.table.take(pa.array(train)), "valid": there.table.take(pa.array(valid))}


def load(
    config: TrainConfig, device: torch.device, workers_on_node: int, normalization: Normalization | None
) -> ImageLoader:
    """Open a loader of the pictures that `prepare` has decoded on this node.

    Args:
        config: configuration that names the pictures.
        device: device of the batches.
        workers_on_node: number of workers that share this node's cores.
        normalization: overrides the mean and standard deviation of the training pictures.

    Raises:
        UserError: if `prepare` has not run on this node or its files are gone.
    """
    data = config.data
    pictures = store.open_picture_store(data, cache_folder(config.data.cache))
    train, valid = split_rows(pictures.table, data, pictures.classes)
    rows: dict[Split, np.ndarray] = {"train": train, "valid": valid}
    mean, std = normalization or _statistics(pictures, train)
    info = DatasetInfo(
        name=PurePosixPath(data.uri.rstrip("/")).name,
        source=redact(data.uri) + exclusion.describe(pictures.table, data),
        classes=pictures.classes,
        channels=3,
        height=data.image_size,
        width=data.image_size,
        mean=mean,
        std=std,
        train_size=len(train),
        valid_size=len(valid),
        multilabel=is_multilabel(pictures.table),
    )
    return ImageLoader(
        pictures,
        _source(config, pictures, device, workers_on_node),
        rows,
        info,
        device=device,
        augmentation=Augmentation.from_config(config.augmentation, config.run.seed),
        mixing=Mixing.from_config(config.augmentation, len(pictures.classes), config.run.seed),
        channels_last=config.loop.channels_last,
    )


def _source(
    config: TrainConfig, pictures: store.PictureStore, device: torch.device, workers_on_node: int
) -> PixelSource:
    data, pinned = config.data, device.type == "cuda"
    if pictures.pixels is not None:
        places = np.array(pictures.table.column("row"))
        return PixelFile(pictures.pixels, data.image_size, places, pinned=pinned)
    processes = max(1, (data.decode_workers or usable_cores()) // workers_on_node)
    paths = pictures.table.column("path")
    return DecodingSource(data, paths, processes=processes, timeout=config.runtime.data_timeout, pinned=pinned)


def _statistics(pictures: store.PictureStore, train: np.ndarray) -> Normalization:
    """Compute the mean and standard deviation of the training pixels for each channel."""
    moments = np.asarray(pictures.table.column("moments").combine_chunks().flatten()).reshape(-1, 6)
    mean, square = moments[train].mean(0, dtype=np.float64).reshape(2, 3)
    # Pictures of one color have no deviation; 1/255 is that of rounding.
    std = np.sqrt(np.maximum(square - mean**2, (1 / 255) ** 2))
    return tuple(mean.tolist()), tuple(std.tolist())
