"""Saves a run as checkpoints, and restores it from one."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvdist import storage
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints import shards as ckpt_shards
from cvdist.checkpoints.format import UNSCORED, Checkpoint, DamagedCheckpoint
from cvdist.checkpoints.worker import Worker
from cvdist.config import TrainConfig
from cvdist.data.dataset import Shuffle
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.device import random_state, set_random_state
from cvdist.distributed.tensor_shard import TensorShard
from cvdist.errors import UserError
from cvdist.seeding import derive_seed
from cvdist.training.finite import require_finite_weights
from cvdist.training.optimizer import restore_optimizer
from cvdist.training.run import Run, initial_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that a run continues from.

    Attributes:
        checkpoint: Its contents. Tensors of a split model are read only when they are needed.
        name: How messages name it.
        adopted: Whether it belongs to another run (`--resume`).
    """

    checkpoint: Checkpoint
    name: str
    adopted: bool


@contextmanager
def open_newest(config: TrainConfig, worker: Worker) -> Iterator[FoundCheckpoint | None]:
    """Open the checkpoint to continue from, for as long as the context lasts. None if the run is new.

    It is the newest checkpoint of this run that all workers can read, or the one that `--resume` names if the
    run has none. All workers must call this.

    Raises:
        UserError: On all workers, if the run has checkpoints but none can be read, or if that of `--resume`
            can't.
    """
    names = worker.checkpoints()
    for name in names:
        damage = ""
        with ExitStack() as stack:
            with raise_on_all_ranks():
                try:
                    folder = stack.enter_context(worker.open_checkpoint(name))
                    checkpoint = _read(folder, f"{name} of this run", worker.device)
                except DamagedCheckpoint as error:
                    damage = str(error)
            damaged = next(filter(None, gather(damage)), "")
            if not damaged:
                yield FoundCheckpoint(checkpoint, f"{name} of this run", adopted=False)
                return
        if worker.rank == 0:
            logger.warning("%s", damaged.replace("name another one", "trying the one before"))
    if names:
        raise UserError(
            "none of this run's checkpoints can be read: start under another --name, or from another run's "
            "with --resume",
            on_all_workers=True,
        )
    resume = config.checkpoint.resume
    if not resume:
        yield None
        return
    with ExitStack() as stack:
        with raise_on_all_ranks():
            folder = stack.enter_context(storage.local_copy(resume))
            checkpoint = _read(folder, resume, worker.device)
            # The other run may have trained from other features than this one does.
            checkpoint.progress.ridge = checkpoint.progress.logistic = None
        yield FoundCheckpoint(checkpoint, resume, adopted=True)


def restore(run: Run, found: FoundCheckpoint) -> None:
    """Continue `run` from a checkpoint: weights, optimizer, random streams, progress and results.

    Raises:
        UserError: If the checkpoint is of another model, optimizer or `--select-by`.
    """
    saved, device = found.checkpoint, run.worker.device
    ckpt.require_fit(saved, run.identity, found.name)
    history, select_by = saved.progress.history, run.config.loop.select_by
    if history and history[-1].select_by != select_by:
        raise UserError(
            f"checkpoint {found.name} chose the best epoch by {history[-1].select_by}: set --select-by as it "
            "was, or start under another --name"
        )
    state = ckpt_shards.take_shards(saved.state, _shard_of(run), device)
    run.model.load_state_dict(state["model"])
    restore_optimizer(run.optimizer, state["optimizer"], found.name)
    if state.get("scaler") and run.scaler.is_enabled():  # neither if another --precision was used
        run.scaler.load_state_dict(state["scaler"])
    if run.ema is not None:
        run.ema.load_state_dict(state.get("ema") or run.ema.state_dict())
    _restore_random_state(run, saved, state["rng"])
    run.progress, run.best = saved.progress, saved.best
    run.visualizer.load_state(state.get("visualizer"))
    if not run.main:
        # These are sums over all workers, and they will be summed over the workers again.
        run.progress.loss_sum, run.progress.correct = 0.0, 0
    run.adopted = found.adopted
    run.changed = changes_between(saved.made_with, run.made_with)
    if saved.progress.position and saved.order != run.order:
        # The position would mean other samples.
        run.progress = replace(saved.progress, position=0, shuffle=Shuffle(), loss_sum=0.0, correct=0)
        run.changed += f"; epoch {saved.progress.epoch + 1} begins again"
    run.resumed_at = f"epoch {run.progress.epoch + 1}, sample {run.progress.position}"


def changes_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences between two `Run.made_with`, as `--lr 0.1 (was 0.01), ...`; empty if none."""
    changed = [name for name, value in now.items() if before.get(name) != value]
    return ", ".join(f"{name} {now[name]} (was {before.get(name)})" for name in changed)


def save(run: Run, *, step: int = 0) -> None:
    """Save a checkpoint of the present state. All workers must call this.

    The state is copied to main memory, and the copy is written while training continues.

    Args:
        run: The run.
        step: The number of steps done in the current epoch. 0: an epoch has just ended.

    Raises:
        UserError: On all workers, if a weight is not finite, or if the last checkpoint could not be stored.
    """
    progress, worker = run.progress, run.worker
    if step:
        name, score = f"epoch-{progress.epoch + 1:04}-step-{step:06}", UNSCORED
    else:
        name, score = f"epoch-{progress.epoch:04}", progress.history[-1].score
    at = progress.epoch * run.info.train_size + progress.position
    with raise_on_all_ranks():
        require_finite_weights(run.trained, name)
    state = {
        "model": ckpt.model_state(run.model),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else None,
        "scaler": run.scaler.state_dict(),
        "rng": gather(random_state(worker.device)),
        "visualizer": run.visualizer.state(),
    }
    rank, count = worker.rank, worker.world_size
    split: dict[str, tuple[Tensor, TensorShard]] = {}
    if run.mode.shards:
        state, split = ckpt_shards.separate(state, _shard_of(run))
        split = {path: (tensor.detach().to("cpu", copy=True), shard) for path, (tensor, shard) in split.items()}
    elif not run.main:
        worker.save_checkpoint(name, score, at, None)
        return
    whole: Checkpoint | None = None
    if run.main:
        whole = ckpt.snapshot(
            Checkpoint(
                run.identity,
                run.order,
                progress,
                run.best,
                state,
                run.normalization,
                parallel=run.mode.name,
                workers=count if split else 0,
                made_with=run.made_with,
            )
        )

    def fill(folder: Path) -> None:
        if split:
            ckpt_shards.write(folder, rank, count, split)
        if whole is not None:
            ckpt.save(folder, whole)

    awaited = [ckpt_shards.names(count, other)[1] for other in range(1, count)] if split else []
    worker.save_checkpoint(name, score, at, fill, awaited)


def exit_when_stored(run: Run) -> None:
    """End this process as soon as the last checkpoint is stored, with the exit code of SIGTERM.

    Raises:
        SystemExit: Always, unless the checkpoint can't be stored.
        UserError: On all workers, if the checkpoint can't be stored.
    """
    run.worker.wait_for_uploads()
    if run.main:
        name = run.config.run.name
        logger.info("stopped by SIGTERM after a checkpoint: --name %s goes on from it", name)
    sys.exit(128 + signal.SIGTERM)


def best_model(run: Run) -> nn.Module:
    """Return the whole model with the weights of the best epoch's checkpoint, for pictures.

    Without a checkpoint it has the present weights.
    """
    with run.worker.open_best_checkpoint() as folder:
        saved = ckpt.load(folder, map_location=run.worker.device) if folder is not None else None
    if saved is not None and run.mode.shards:
        model = initial_model(run.config, run.info)  # no worker has the whole of a split model
        model.load_state_dict(ckpt.trained_tensors(saved))
        return model
    if saved is not None:
        average = saved.state["ema"] if run.ema is not None else None
        target = run.ema if run.ema is not None and average else run.model
        target.load_state_dict(average or saved.state["model"])
    return run.evaluated_model()


def _read(folder: Path, name: str, device: torch.device) -> Checkpoint:
    return ckpt.load(folder, map_location=device, name=name, whole=False)


def _restore_random_state(run: Run, saved: Checkpoint, states: list[dict[str, Tensor]]) -> None:
    """Continue the random streams of the checkpoint's workers, if as many workers draw from them now."""
    rank = run.mode.random_rank
    # With a split head, all workers draw what one process would.
    was_one = saved.parallel == "head" or len(states) == 1
    is_one = run.mode.name == "head" or run.worker.world_size == 1
    if was_one == is_one and (is_one or len(states) == run.worker.world_size):
        set_random_state(states[rank], run.worker.device)
        return
    # Other streams than those that the run began with, or dropout would repeat its first masks.
    at = (saved.progress.epoch, saved.progress.position)
    torch.manual_seed(derive_seed("dropout", run.config.run.seed, rank, *at))


def _shard_of(run: Run) -> ckpt_shards.TensorShardOf:
    """Return a function from a tensor of the training state to this worker's shard of it."""
    names = {id(p): name for name, p in run.trained.named_parameters()}
    order = [names[id(p)] for group in run.optimizer.param_groups for p in group["params"]]
    return ckpt_shards.slices_by_path(run.mode.shards, order)
