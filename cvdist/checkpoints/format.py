"""The format of checkpoints: a folder of two files, or of more for a split model, from which a run continues.

`state.pt` holds tensors and numbers (weights, their moving average, optimizer state, random states) and is read
with `weights_only=True`; `checkpoint.json` holds the rest and can be read by a person. A folder without
`checkpoint.json` is not a checkpoint. It has the SHA-256 of `state.pt` and its own, so that a file that was cut
or has changed is found before anything of it is used. Tensors that are split over the workers lie beside them,
in files of each worker's own (`cvdist.checkpoints.shards`).
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvdist.checkpoints import shards
from cvdist.data.dataset import Shuffle
from cvdist.errors import UserError
from cvdist.multilabel import Counts
from cvdist.results import (
    EpochRecord,
    Evaluation,
    LabelResults,
    LogisticResult,
    Mistake,
    ModelIdentity,
    RidgeResult,
)
from cvdist.storage import file_digest

FORMAT = 1
UNSCORED = -1.0  # the score of a checkpoint within an epoch
STATE, META = "state.pt", "checkpoint.json"
_AVERAGED = "module."  # where `torch.optim.swa_utils.AveragedModel` has the model


class DamagedCheckpoint(UserError):
    """Raised if a checkpoint is not what was written. An older one may be good."""


@dataclass(frozen=True)
class OrderIdentity:
    """Everything that has to be equal for a position within an epoch to mean the same samples."""

    train_size: int
    seed: int


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: Epochs finished.
        position: Samples of the next epoch already trained on, over all workers.
        shuffle: How that epoch is shuffled.
        loss_sum: Sum of the losses of those samples.
        correct: How many of them were classified correctly.
        best_epoch: Number of the best epoch, from 1; 0 before the first validation.
        seconds: Seconds of training so far, in all attempts.
        history: Results of each finished epoch.
        logged: The last step metrics, each with its step: a lost machine may not have delivered them.
        ridge: The baseline, if one was computed.
        logistic: How the head was fitted by logistic regression, if it was.
        thresholds: The classes' thresholds that the last validation chose, where a picture may have several.
    """

    epoch: int = 0
    position: int = 0
    shuffle: Shuffle = field(default_factory=Shuffle)
    loss_sum: float = 0.0
    correct: int = 0
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ridge: RidgeResult | None = None
    logistic: LogisticResult | None = None
    thresholds: tuple[float, ...] = ()

    @property
    def best(self) -> EpochRecord | None:
        """The record of the best epoch."""
        return next((record for record in self.history if record.epoch == self.best_epoch), None)


@dataclass(frozen=True)
class Normalization:
    """The way pictures are resized and normalized: (pixel in [0, 1] - mean) / std, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"


@dataclass
class Checkpoint:
    """The content of a checkpoint's files.

    Attributes:
        model: Identity of the model that the weights fit.
        order: Identity of the order of samples that `progress.position` refers to.
        progress: How far the run has come.
        best: The evaluation of the best epoch so far.
        made_with: Settings and data that the run depends on, by the names that people know.
        state: Tensors and numbers of the model, its moving average, the optimizer and the random streams.
        normalization: Normalization of the model's input.
        parallel: How steps were divided over the workers (`cvdist.parallel`).
        workers: Number of workers with shards of the model in files of their own; 0 if one file has it all.
    """

    model: ModelIdentity
    order: OrderIdentity
    progress: Progress
    best: Evaluation | None
    state: dict[str, Any]
    normalization: Normalization
    parallel: str = ""
    workers: int = 0
    made_with: dict[str, Any] = field(default_factory=dict)


def snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint to main memory, so that it can be written while training changes the original."""
    return dataclasses.replace(
        checkpoint, progress=copy.deepcopy(checkpoint.progress), state=_copied(checkpoint.state)
    )


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` into an existing folder.

    Raises:
        OSError: If the disk can't take it.
    """
    best = dataclasses.asdict(checkpoint.best) if checkpoint.best else None
    tensors = {name: best.pop(name) for name in ("confusion", "labels")} if best else None
    progress = dataclasses.asdict(checkpoint.progress)
    logged = progress.pop("logged")  # too long for a person
    try:
        torch.save({**checkpoint.state, "best": tensors, "logged": logged}, folder / STATE)
    except RuntimeError as error:
        # PyTorch keeps the system's reason to itself.
        if shutil.disk_usage(folder).free < 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    meta = {
        "format": FORMAT,
        "model": dataclasses.asdict(checkpoint.model),
        "order": dataclasses.asdict(checkpoint.order),
        "progress": progress,
        "best": best,
        "normalization": dataclasses.asdict(checkpoint.normalization),
        "parallel": checkpoint.parallel,
        "workers": checkpoint.workers,
        "made_with": checkpoint.made_with,
        "state_sha256": file_digest(folder / STATE),
    }
    (folder / META).write_text(json.dumps({**meta, "sha256": _digest(meta)}, indent=1))


def load(
    folder: Path, *, map_location: str | torch.device = "cpu", name: str = "", whole: bool = True
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        folder: Where its files are.
        map_location: The device that tensors are loaded to.
        name: What messages call the checkpoint, instead of its folder.
        whole: Whether to join tensors that lie in the files of several workers. If not, `state` has
            `shards.Pieces` in their place.

    Raises:
        DamagedCheckpoint: If it is incomplete or not what was written.
        UserError: If it is of an unknown format.
    """
    name = name or str(folder)
    meta = read_meta(folder, name)
    try:
        if meta["state_sha256"] != file_digest(folder / STATE):
            raise ValueError(f"{STATE} is not what was written")
        # No pickle from storage: weights_only refuses anything but tensors and plain containers.
        state = torch.load(folder / STATE, map_location=map_location, weights_only=True)
        workers = int(meta["workers"])
        if workers:
            state = shards.join(state, folder, workers)
        if workers and whole:
            state = shards.whole(state, map_location)
        return Checkpoint(
            model=ModelIdentity.from_dict(meta["model"]),
            order=OrderIdentity(**meta["order"]),
            progress=_progress(meta["progress"], state.pop("logged", [])),
            best=_evaluation({**meta["best"], **_copied(state.pop("best"))}) if meta["best"] else None,
            state=state,
            normalization=Normalization(
                tuple(meta["normalization"]["mean"]),
                tuple(meta["normalization"]["std"]),
                str(meta["normalization"]["resize"]),
            ),
            parallel=str(meta["parallel"]),
            workers=workers,
            made_with=dict(meta["made_with"]),
        )
    except Exception as error:  # damaged bytes raise all sorts of things
        raise DamagedCheckpoint(f"checkpoint {name} is damaged ({_why(error)}): name another one") from error


def read_meta(folder: Path, name: str = "") -> dict[str, Any]:
    """Read the content of `checkpoint.json` in `folder`.

    Raises:
        DamagedCheckpoint: If it is missing, unreadable or not what was written.
        UserError: If it is of an unknown format.
    """
    name = name or str(folder)
    try:
        content = (folder / META).read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{name} is no checkpoint: it has no {META}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged ({_why(error)}): name another one") from error
    return parse_meta(content, name)


def parse_meta(content: bytes, name: str) -> dict[str, Any]:
    """Parse the content of a `checkpoint.json` from its bytes.

    Raises:
        DamagedCheckpoint: If it is not what was written.
        UserError: If it is of an unknown format.
    """
    try:
        meta = json.loads(content)
        if not isinstance(meta, dict):
            raise ValueError(f"{META} holds no object")
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged ({_why(error)}): name another one") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"checkpoint {name} has a format that this version does not read (it reads {FORMAT})")
    if meta.pop("sha256", None) != _digest(meta):
        raise DamagedCheckpoint(f"checkpoint {name} is damaged ({META} has changed): name another one")
    return meta


def progress_of(meta: dict[str, Any]) -> tuple[float, int]:
    """Return the score of the checkpoint that `meta` describes, and the number of samples trained on so far."""
    progress = _progress(meta["progress"], [])
    ends_epoch = progress.history and not progress.position
    at = progress.epoch * int(meta["order"]["train_size"]) + progress.position
    return (progress.history[-1].score if ends_epoch else UNSCORED), at


def require_fit(checkpoint: Checkpoint, model: ModelIdentity, name: str) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        UserError: If it does not fit; the message says what differs and what to do.
    """
    if checkpoint.model != model:
        raise UserError(
            f"checkpoint {name} is of model {checkpoint.model}, this run trains {model}: "
            "start it under another --name, or with the checkpoint's --model, --head and data"
        )


def trained_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the model's tensors by name, or the moving average's if there is one."""
    tensors: dict[str, Tensor] = dict(checkpoint.state["model"])
    for name, tensor in (checkpoint.state.get("ema") or {}).items():
        if name.startswith(_AVERAGED):  # the rest counts its updates
            tensors[name.removeprefix(_AVERAGED)] = tensor
    return tensors


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors by name, without the prefixes that wrappers add."""
    return {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}


def _copied(state: Any) -> Any:
    """Return `state` with each tensor in it copied to main memory."""

    def copied(path: str, value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    return shards.map_leaves(copied, state)


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _why(error: Exception) -> str:
    """Return the reason of an error in one short line, because errors about hostile bytes fill pages."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first[:100] if isinstance(error, ValueError | OSError) and first else type(error).__name__


def _progress(values: dict[str, Any], logged: list[Any]) -> Progress:
    history = [EpochRecord(**record) for record in values["history"]]
    shuffle = Shuffle(**values["shuffle"])
    steps = [(int(step), dict(metrics)) for step, metrics in logged]
    ridge = RidgeResult(**values["ridge"]) if values["ridge"] else None
    logistic = LogisticResult.from_dict(values["logistic"]) if values["logistic"] else None
    read = {"history": history, "shuffle": shuffle, "logged": steps, "ridge": ridge, "logistic": logistic}
    return Progress(**{**values, **read, "thresholds": tuple(values["thresholds"])})


def _evaluation(values: dict[str, Any]) -> Evaluation:
    mistakes = [
        Mistake(one["index"], tuple(one["true"]), tuple(one["predicted"]), one["confidence"])
        for one in values["mistakes"]
    ]
    labels = values["labels"]
    if labels:
        labels = LabelResults(**{**labels, "counts": Counts(**labels["counts"])})
    return Evaluation(**{**values, "mistakes": mistakes, "labels": labels})
