"""Opens a cache for training: checks that it fits the configuration, and decides how the node holds it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdist.config import TrainConfig, cache_folder
from cvdist.data.augment import Augmentation
from cvdist.data.dataset import DatasetInfo, Split
from cvdist.data.forms import root_of
from cvdist.data.images import exclusion
from cvdist.data.images.ahead import Reader
from cvdist.data.images.listing import list_pictures, split_rows
from cvdist.data.images.versions import digest_of_rows, with_versions
from cvdist.data.labels import is_multilabel, label_column, labels_of
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.errors import UserError
from cvdist.features import changes, fingerprint, local, manifest
from cvdist.features.build import parse_index
from cvdist.features.copies import Copy, DeviceCopy, FeatureRows, MappedCopy
from cvdist.features.loader import FeatureLoader
from cvdist.features.local import LocalShards
from cvdist.features.manifest import Manifest
from cvdist.log import redact
from cvdist.storage import Folder

logger = logging.getLogger(__name__)

_AS_IT_IS = ("views", "augmentation", "dtype", "precision", "decoder")  # a run takes them as the cache has them
_WINDOWS = 3  # windows of shards that a worker keeps if not all fit: one in use, one before, one ahead
_DEVICE_SHARE = 0.5  # of a GPU's free memory that features may take


def prepare(config: TrainConfig) -> None:
    """Check that the cache at `--features` holds the features that the configuration asks for.

    Raises:
        UserError: if it does not; the message says what differs.
    """
    folder, cache = open_manifest(config)
    asked = fingerprint.for_training(config.data, config.model)
    uri = redact(folder.uri)
    differences = cache.fingerprint.differences(asked, leave_out=_AS_IT_IS)
    if differences:
        raise UserError(
            f"--features {uri} was made otherwise than this run asks for ({'; '.join(differences)}): correct "
            "the flags, or make another cache with jobs/preprocess.py"
        )
    _used_views(config, cache)
    if config.data.uri:
        require_same_pictures(config, folder, cache)


def load(config: TrainConfig, device: torch.device, workers_on_node: int) -> FeatureLoader:
    """Open a loader of the cache's features. All workers have to call it together.

    Args:
        config: configuration that names the cache.
        device: device of the batches.
        workers_on_node: number of workers on this node.

    Raises:
        UserError: if the cache is damaged, or too large for the part of the disk that the node may use.
    """
    with raise_on_all_ranks():  # what follows compares the nodes: no worker may be missing there
        folder, cache = open_manifest(config)
        root = cache_folder(config.data.cache)
        content = local.local_index(folder, cache, root, config.runtime.prepare_timeout)
        table = parse_index(content, folder, cache)
        table = table.filter(pa.array(np.asarray(table.column("shard")) >= 0))
        train, valid = split_rows(table, config.data, cache.classes)
        excluded = exclusion.describe(table, config.data)
        views = _used_views(config, cache)
    copy, window, note = _copy(config, folder, cache, device, workers_on_node)
    columns = {name: np.asarray(table.column(name)).astype(np.int64) for name in ("shard", "row")}
    labels = labels_of(table, len(cache.classes))
    rows: dict[Split, np.ndarray] = {"train": train, "valid": valid}
    paths = table.column("path")

    def paths_of(part: Split, indices: Sequence[int]) -> list[str]:
        return [paths[int(rows[part][i])].as_py() for i in indices]

    mark = cache.fingerprint
    return FeatureLoader(
        DatasetInfo(
            name=PurePosixPath((config.data.uri or cache.source).rstrip("/")).name,
            source=f"{redact(config.data.uri or cache.source)}, features from {redact(folder.uri)}" + excluded,
            classes=cache.classes,
            channels=3,
            height=mark.size,
            width=mark.size,
            mean=mark.mean,
            std=mark.std,
            train_size=len(train),
            valid_size=len(valid),
            multilabel=cache.multilabel,
        ),
        copy,
        {part: FeatureRows(columns["shard"][r], columns["row"][r], np.zeros(0)) for part, r in rows.items()},
        {part: labels[r] for part, r in rows.items()},
        paths_of,
        device=device,
        views=views,
        seed=config.run.seed,
        window=window,
        digest=digest_of_rows(
            table, rows.values(), ("digest", label_column(table), *(("shard", "row") if window else ()))
        ),
        quarantine=cache.bad,
        augmentation=_augmentation(cache) if views > 1 else None,
        pictures=_originals(config, cache),
        note=note + (f", {views} views of each training picture" if views > 1 else ""),
    )


def open_manifest(config: TrainConfig) -> tuple[Folder, Manifest]:
    """Return the folder of the cache at `--features`, and its manifest.

    Raises:
        UserError: if there is no cache, or it can't be used.
    """
    folder = Folder.open(config.features.uri, "--features")
    return folder, manifest.read(folder)


def _used_views(config: TrainConfig, cache: Manifest) -> int:
    """Return how many views of a training sample are chosen from."""
    mark, asked = cache.fingerprint, config.features.views
    uri = redact(config.features.uri)
    wanted = fingerprint.augmentation_of(config.augmentation)
    if asked > mark.views:
        raise UserError(f"--views {asked}: --features {uri} has {mark.views}: extract more, or ask for fewer")
    if wanted is None:
        return asked or mark.views
    if mark.views == 1:
        raise UserError(
            f"--features {uri} has each picture as it is, and this run asks for augmentation: make a cache "
            "with jobs/preprocess.py --views 4 and the same flags, or choose a recipe without"
        )
    if wanted != mark.augmentation:
        raise UserError(
            f"--features {uri} has views by another augmentation "
            f"({fingerprint.format_value(mark.augmentation)}) than this run asks for "
            f"({fingerprint.format_value(wanted)}): correct the flags, or make another cache"
        )
    return asked or mark.views


def require_same_pictures(config: TrainConfig, folder: Folder, cache: Manifest) -> None:
    """Check that the pictures of `--data` are those that the features were computed from.

    Raises:
        UserError: if not; the message names a picture that was added, changed or removed.
    """
    listing = list_pictures(config.data)
    known = parse_index(
        local.local_index(folder, cache, cache_folder(config.data.cache), config.runtime.prepare_timeout),
        folder,
        cache,
    )
    if is_multilabel(listing.table) != cache.multilabel:
        one, several = "one class a picture", "any number of classes a picture"
        then, now = (several, one) if cache.multilabel else (one, several)
        raise UserError(
            f"--features {redact(folder.uri)} has {then}, --data {redact(config.data.uri)} has {now}: run "
            "jobs/preprocess.py again, which keeps the features"
        )
    if listing.classes != cache.classes:
        raise UserError(
            f"--features {redact(folder.uri)} is of the classes {', '.join(cache.classes)}, --data "
            f"{redact(config.data.uri)} has {', '.join(listing.classes)}: run jobs/preprocess.py again"
        )
    table = with_versions(listing.table, root_of(config.data), cache_folder(config.data.cache))
    known = changes.with_labels_as_in(listing, known, cache.classes)
    found = changes.find_changes(table, known, root_of(config.data))
    if found.differs:
        raise UserError(
            f"--features {redact(folder.uri)} is out of date for --data {redact(config.data.uri)} "
            f"({found.describe(listing.table)}): run jobs/preprocess.py again, which computes only what has "
            "changed"
        )


def _copy(
    config: TrainConfig, folder: Folder, cache: Manifest, device: torch.device, workers_on_node: int
) -> tuple[Copy, int, str]:
    """Decide how this node holds the features. All workers have to call it together.

    Returns:
        The copy, the window of the shuffle in shards (0 if all samples are shuffled), and one line for the log.
    """
    root, settings = cache_folder(config.data.cache), config.features
    limit = int(settings.local_cache_gb * 1e9) or local.shard_budget(root, config.data.cache_fraction)
    on_device = device.type == "cuda" and settings.on_device
    if on_device:
        on_device = cache.raw_bytes < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    largest = max((entry.raw_bytes for entry in cache.shards), default=1)
    window = min(settings.shuffle_window, limit // (_WINDOWS * workers_on_node * largest))
    # All workers shuffle alike, so the node with the least room decides.
    rooms = gather((cache.raw_bytes <= limit or on_device, window))
    whole, window = all(fits for fits, _ in rooms), min(size for _, size in rooms)
    if not whole and window < 1:
        raise UserError(
            f"--cache {root} may hold {limit / 1e9:.3g} GB of features, and {workers_on_node} workers need "
            f"{_WINDOWS * workers_on_node * largest / 1e9:.3g} GB at least: raise --local-cache-gb, make room, "
            "or extract with a smaller --shard-size",
            on_all_workers=True,
        )
    timeout = config.runtime.data_timeout
    mapped = MappedCopy(
        LocalShards(
            Folder.open(folder.uri, folder.flag, patient=True), cache, root, limit=limit, timeout=timeout
        ),
        fetch_threads=settings.fetch_threads,
        timeout=timeout,
        window=0 if whole else window,
        pinned=device.type == "cuda",
    )
    size = f"{cache.raw_bytes / 1e9:,.2f} GB"
    if not whole:
        fits = f"{limit / 1e9:,.2f} GB fit this node: shuffled {window} of {len(cache.shards)} shards at a time"
        return mapped, window, f"{size}, of which {fits} (--local-cache-gb)"
    if on_device:
        return DeviceCopy(mapped, device), 0, f"{size} in GPU memory"
    return mapped, 0, f"{size} on this node, mapped from {local.shards_folder(root)}"


def _augmentation(cache: Manifest) -> Augmentation | None:
    values = cache.fingerprint.augmentation
    return Augmentation(**values) if values else None  # type: ignore[arg-type]


def _originals(config: TrainConfig, cache: Manifest) -> Callable[[Sequence[str]], Tensor]:
    """Return a function that reads original pictures for figures, from `--data` or where the cache is from."""
    roots = dict.fromkeys([*([root_of(config.data)] if config.data.uri else []), cache.root])
    size, resize = cache.fingerprint.size, cache.fingerprint.resize

    def pictures(paths: Sequence[str]) -> Tensor:
        for root in roots:  # the paths in the index are those of the form that the cache was made from
            try:
                return Reader(root, size, resize).pixels(paths).permute(0, 3, 1, 2).contiguous()
            except UserError as error:
                why = error
        logger.warning("pictures   %s can't be read for figures: %s", redact(cache.root), why)
        return torch.full((len(paths), 3, size, size), 128, dtype=torch.uint8)

    return pictures
