"""The labeled pictures that models are evaluated on, and the computation of their predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdist import loaders
from cvdist.config import DataConfig, EvaluateConfig, InferenceConfig, TableConfig, part_of
from cvdist.data.forms import NO_PART, TRAIN_PART, VALID_PART, root_of
from cvdist.data.images import as_split_in_training
from cvdist.data.images.ahead import Reader
from cvdist.data.images.exclusion import kept_rows
from cvdist.data.images.listing import list_pictures
from cvdist.data.labels import labels_of
from cvdist.data.normalize import Normalizer
from cvdist.data.quarantine import BadPicture, require_few_bad
from cvdist.distributed.precision import choose_precision
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.models.servable import log_probabilities
from cvdist.prediction.predict import Predictor
from cvdist.saved import SavedModel

_CHUNK = 512  # pictures that are decoded and predicted in one go
_BATCH = {"cpu": 250, "cuda": 2000}  # small pictures a forward pass

Labeled = tuple[Tensor, Tensor]
"""Rows int64 (n,), log-probabilities float32 (n, the model's classes)."""


class EvaluationPictures(Protocol):
    """Labeled pictures.

    name: name of the data for people; classes: names of the classes; labels: int64 (N,), positions in
        `classes`, or bool (N, classes) if pictures may have several; quarantine: the pictures that can't be
        decoded, known after a model has seen all.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    quarantine: Sequence[BadPicture]

    def log_probabilities(
        self, saved: SavedModel, inference: InferenceConfig, device: torch.device
    ) -> Iterator[Labeled]:
        """Yield a model's log-probabilities of all pictures, each once, in any order.

        Raises:
            UserError: if the model takes another kind of picture, or too many can't be decoded.
        """
        ...

    def pixels(self, rows: Sequence[int], size: int) -> Tensor:
        """Return some pictures as uint8 (n, C, H, W), for people to look at; `size`: side of photographs."""
        ...


def open_pictures(config: EvaluateConfig, saved: SavedModel) -> EvaluationPictures:
    """Open the pictures that `config` names. By default they are those that the model was trained on.

    Raises:
        UserError: if the pictures are missing, or neither the configuration nor the model names any.
    """
    wanted, own = _wanted(config, saved)
    part = config.evaluation.part
    if wanted.dataset == "images":
        return PictureFolder(config, wanted, part, own=own)
    return InMemoryPictures(wanted, config.saved.storage, part or "valid")


def _wanted(config: EvaluateConfig, saved: SavedModel) -> tuple[DataConfig, bool]:
    """Choose the data set.

    Returns:
        Its configuration, and whether the model was trained on this data set.

    Raises:
        UserError: if neither the configuration nor the model names any pictures.
    """
    asked, learned = config.evaluation, saved.data
    if not asked.data and not asked.dataset:
        if learned is None:
            raise UserError(
                f"{saved.source} does not say what it was trained on: name pictures with --data, or --dataset "
                "digits or mnist"
            )
        if masked := [uri for uri in (learned.uri, learned.root) if "***" in uri]:
            raise UserError(
                f"{saved.source} was trained on {masked[0]}, whose credentials were not noted: name it with "
                "--data"
            )
        chosen = learned
    else:
        chosen = DataConfig(dataset=asked.dataset or "images", uri=asked.data, resize=saved.learned_resize())
        if learned is not None and learned.dataset == chosen.dataset:
            uri = asked.data or learned.uri
            # Another data set may lack what a table or --exclude names.
            same = uri.rstrip("/") == learned.uri.rstrip("/")
            other = {} if same else {**vars(TableConfig()), "exclude": ""}
            chosen = dataclasses.replace(learned, **other, uri=uri)
    table = {name: value for name, value in vars(part_of(TableConfig, asked)).items() if value}
    chosen = dataclasses.replace(chosen, **table)
    if chosen.dataset == "images" and not chosen.uri:
        raise UserError(
            f"--data is needed: {saved.source} was trained without naming its pictures, or on something else"
        )
    inference = config.inference
    chosen = dataclasses.replace(
        chosen,
        image_size=saved.identity.height,
        resize=inference.resize or chosen.resize,
        max_bad_fraction=inference.max_bad_fraction,
        decode_workers=inference.decode_workers,
        cache=asked.cache,
    )
    return chosen, learned is not None and (chosen.dataset, chosen.uri.rstrip("/")) == (
        learned.dataset,
        learned.uri.rstrip("/"),
    )


class InMemoryPictures:
    """Pictures of a data set that fits in memory: digits or MNIST."""

    def __init__(self, data: DataConfig, storage: str, part: str) -> None:
        """Load the part `valid`, `train` or `all` of a data set; storage: the value of `RunConfig.storage`.

        Raises:
            UserError: if the data set can't be loaded.
        """
        loaders.prepare_in_memory(data, storage)
        loader = loaders.open_in_memory(data, storage, torch.device("cpu"))
        self._info = info = loader.info
        self.name = f"{info.name} ({_PARTS[part]}): {info.source}"
        self.classes = info.classes
        self.quarantine: Sequence[BadPicture] = ()
        splits = [loader.splits[split] for split in ("valid", "train") if part in (split, "all")]
        self._images = torch.cat([split.images for split in splits])
        self.labels = torch.cat([split.labels for split in splits])

    @torch.inference_mode()
    def log_probabilities(
        self, saved: SavedModel, inference: InferenceConfig, device: torch.device
    ) -> Iterator[Labeled]:
        """Yield the log-probabilities of all pictures (`EvaluationPictures.log_probabilities`)."""
        info, shape = self._info, saved.identity
        if (info.channels, info.height, info.width) != (shape.channels, shape.height, shape.width):
            raise UserError(
                f"{saved.source} takes {shape.channels}x{shape.height}x{shape.width} pictures, those of "
                f"{info.name} are {info.channels}x{info.height}x{info.width}: name others with --data"
            )
        normalize = Normalizer(saved.mean, saved.std, device, channels_last=True)
        precision = choose_precision(inference.precision, device)
        layout = torch.channels_last if inference.channels_last else torch.contiguous_format
        model = saved.model.to(device).to(memory_format=layout)
        for rows in torch.arange(len(self.labels)).split(_BATCH[device.type]):
            with precision.autocast():
                scores = model(normalize(self._images[rows].to(device).float()))
            yield rows, log_probabilities(scores, multilabel=shape.multilabel).cpu()

    def pixels(self, rows: Sequence[int], size: int) -> Tensor:
        """Return some pictures for people to look at (`EvaluationPictures.pixels`)."""
        return self._images[list(rows)]


class PictureFolder:
    """Photographs, in folders or in any other form of data."""

    def __init__(self, config: EvaluateConfig, wanted: DataConfig, part: str, *, own: bool) -> None:
        """List the pictures, and split those that have no division of their own, if one is asked for.

        Args:
            config: The settings of the job.
            wanted: The pictures.
            part: `valid`, `train` or `all`; empty: those that a model has not learned from, if that is known.
            own: Whether the model has learned from these pictures.

        Raises:
            UserError: if the pictures can't be read, or have no classes.
        """
        listing = list_pictures(wanted, fewest_classes=1)
        table, divided = listing.table, not (np.asarray(listing.table.column("part")) == NO_PART).all()
        self._wanted = wanted
        part = part or ("valid" if own or divided else "all")
        if part != "all" and divided:
            value = VALID_PART if part == "valid" else TRAIN_PART
            table = table.filter(pa.array(np.asarray(table.column("part")) == value))
        elif part != "all":
            timeout = config.evaluation.prepare_timeout
            split = as_split_in_training(wanted, timeout=timeout, data_timeout=config.inference.data_timeout)
            table = split["valid" if part == "valid" else "train"]
        table = table.filter(pa.array(kept_rows(table, wanted)))
        self._paths: list[str] = table.column("path").to_pylist()
        self.name, self.classes = f"{redact(wanted.uri)} ({_PARTS[part]})", listing.classes
        self.labels = labels_of(table, len(listing.classes))
        self.quarantine: Sequence[BadPicture] = ()

    def log_probabilities(
        self, saved: SavedModel, inference: InferenceConfig, device: torch.device
    ) -> Iterator[Labeled]:
        """Yield the log-probabilities of all pictures (`EvaluationPictures.log_probabilities`)."""
        threads = inference.decode_workers
        predictor = Predictor(root_of(self._wanted), inference, saved, device, decode_threads=threads)
        row_of = {path: row for row, path in enumerate(self._paths)}
        bad: list[BadPicture] = []
        for start in range(0, len(self._paths), _CHUNK):
            found, good, unreadable = predictor.log_probabilities(self._paths[start : start + _CHUNK])
            bad += unreadable
            require_few_bad(
                bad, pictures=len(self._paths), fraction=self._wanted.max_bad_fraction, uri=self._wanted.uri
            )
            yield torch.tensor([row_of[path] for path in good], dtype=torch.int64), found
        self.quarantine = tuple(bad)

    def pixels(self, rows: Sequence[int], size: int) -> Tensor:
        """Return some pictures for people to look at (`EvaluationPictures.pixels`)."""
        reader = Reader(root_of(self._wanted), size, self._wanted.resize)
        return reader.pixels([self._paths[row] for row in rows]).permute(0, 3, 1, 2)


_PARTS = {"valid": "validation part", "train": "training part", "all": "all pictures"}


@dataclass(frozen=True)
class ClassMapping:
    """A data set's labels by a model's classes.

    labels: int64 (N,), numbers of the model's classes, or bool (N, classes) if its pictures may have several;
    absent: classes of the model that the data does not have.
    """

    labels: Tensor
    absent: tuple[str, ...]


def match_classes(pictures: EvaluationPictures, saved: SavedModel) -> ClassMapping:
    """Match a data set's classes with a model's by name. The data may lack some of the model's classes.

    If the model gives a picture several labels and the data has one class per picture, this is its only label.

    Raises:
        UserError: if the data has a class that the model does not know, or several labels per picture while the
            model gives one.
    """
    classes, labels = saved.identity.classes, pictures.labels
    if labels.dim() == 2 and not saved.identity.multilabel:
        raise UserError(
            f"{pictures.name} has pictures with several labels, and {saved.source} gives each picture one: "
            "name a model that was trained on such a table"
        )
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in pictures.classes if name not in number]
    if unknown:
        fix = "Rename the folders, or name another model"
        if saved.identity.multilabel and labels.dim() == 1:
            fix = "--label-separator says what stands between several labels"
        raise UserError(
            f"{pictures.name} has classes that {saved.source} does not know: {_some(unknown)}; it knows "
            f"{_some(classes)}. {fix}"
        )
    absent = tuple(name for name in classes if name not in pictures.classes)
    place = torch.tensor([number[name] for name in pictures.classes])
    if not saved.identity.multilabel:
        return ClassMapping(place[labels], absent)
    several = torch.zeros(len(labels), len(classes), dtype=torch.bool)
    if labels.dim() == 2:
        several[:, place] = labels
    else:
        several[torch.arange(len(labels)), place[labels]] = True
    return ClassMapping(several, absent)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
