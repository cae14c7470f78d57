"""The settings of one sweep: those that all its trials have in common, and what it tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from cvdist.config.bounds import Count, CountOrZero, above, at_least
from cvdist.config.settings import Flag, part_of
from cvdist.config.train import TrainConfig, check
from cvdist.errors import UserError


@dataclass(frozen=True)
class SweepConfig:
    """Which settings a sweep tries, for how long, and whether the best trial is trained on."""

    trials: Count = 20
    """Settings to try. The first ones stay the same when a sweep goes on with more."""
    search: tuple[str, ...] = ()
    """What is searched, as `FLAG=RANGE` without the flag's hyphens: `lr=1e-5:1e-2:log` (from, to, evenly by
    orders of magnitude), `dropout=0:0.7` (evenly), `head=vgg,mlp` (one of these). Empty: learning rate, weight
    decay and dropout around the recipe's, and the head where the model has a choice."""
    seed: Annotated[int, Flag("sweep_seed")] = 0
    """Which points of the ranges are tried. `--seed`, of the training, is the same for all trials."""
    trial_epochs: CountOrZero = 0
    """Epochs of a trial that is not stopped. The learning rate follows `--epochs`, to which the best trial is
    trained on. 0: all of `--epochs`."""
    early_stopping: bool = True
    """Stop trials that fall behind (ASHA, Li et al., "A System for Massively Parallel Hyperparameter Tuning",
    2020)."""
    grace_epochs: Count = 1
    """Epochs that every trial is trained for, before it may be stopped."""
    reduction_factor: Annotated[float, at_least(1.1)] = 3.0
    """One in this many trials goes on after `--grace-epochs`, and one in this many of those after this multiple
    of the epochs, and so on."""
    concurrent_trials: CountOrZero = 0
    """Trials that run side by side, each with `--cpus-per-worker` cores. 0: as many as there is room for."""
    gpus_per_trial: Annotated[float, above(0)] = 1.0
    """GPUs of each trial, where there are any. 0.25: four trials share one."""
    train_best: bool = True
    """Train the best trial on, to all of `--epochs`, as a run of its own with figures, a model and a report."""


@dataclass(frozen=True)
class SweepJobConfig(TrainConfig):
    """One job of `jobs/sweep.py`: the settings that all trials have in common, and those of the sweep."""

    sweep: SweepConfig = field(default_factory=SweepConfig)

    @classmethod
    def of(cls, train: TrainConfig, sweep: SweepConfig | None = None) -> SweepJobConfig:
        """Build the settings of a sweep whose trials are variations of a training."""
        return cls(**vars(part_of(TrainConfig, train)), sweep=sweep or SweepConfig())

    @property
    def train(self) -> TrainConfig:
        """The settings that all trials have in common."""
        return part_of(TrainConfig, self)


def check_sweep(job: SweepJobConfig) -> None:
    """Refuse settings that no sweep can work with, before anything is started.

    What is searched is not looked at.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    check(job)
    sweep, epochs = job.sweep, job.loop.epochs
    if sweep.trial_epochs > epochs:
        raise UserError(
            f"--trial-epochs {sweep.trial_epochs} is above --epochs {epochs}: a trial is the beginning of a "
            "training of --epochs"
        )
    if sweep.grace_epochs > (most := sweep.trial_epochs or epochs):
        flag = "--trial-epochs" if sweep.trial_epochs else "--epochs"
        raise UserError(f"--grace-epochs {sweep.grace_epochs} is above {flag} {most}: lower it")
    if job.runtime.launcher not in ("auto", "ray"):
        raise UserError(f"--runtime {job.runtime.launcher}: sweeps run on Ray, leave it out")
    if job.loop.select_by not in ("auto", "accuracy") or job.loop.patience:
        raise UserError(
            "--select-by and --patience are for one training: a sweep compares trials by accuracy, and stops "
            "those that fall behind by --early-stopping"
        )
    if job.checkpoint.resume:
        raise UserError("--resume is for one training: a sweep goes on under its --name")
    if job.tracking.register and not sweep.train_best:
        raise UserError("--register takes the best trial trained on: leave out --no-train-best")
