"""The settings of one training job, and the check that refuses those that no run can work with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cvdist.config.groups import (
    CUDA_GRAPHS,
    CheckpointConfig,
    DataConfig,
    FeaturesConfig,
    LoopConfig,
    MixingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
    VisualizeConfig,
)
from cvdist.config.places import cache_folder, require_outside, storage_root
from cvdist.config.settings import check_groups, dashed, fields_of
from cvdist.errors import UserError
from cvdist.log import redact


@dataclass(frozen=True)
class TrainConfig:
    """One training job. `recipe` is the name of the function in `cvdist.recipes` that it began from."""

    recipe: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: MixingConfig = field(default_factory=MixingConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    visualize: VisualizeConfig = field(default_factory=VisualizeConfig)


def check(config: TrainConfig) -> None:
    """Refuse settings that no run can work with, before anything is started.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    check_groups(config)
    config.augmentation.require_crops()
    config.runtime.worker_range  # noqa: B018 (raises)
    if config.loop.fit == "logistic" and not config.features.uri:
        raise UserError(
            "--features is needed: the cache for --fit logistic, as jobs/preprocess.py writes it; or train "
            "from pictures, with --fit epochs or the recipe transfer"
        )
    if config.loop.balanced_sampling and config.loop.fit == "logistic":
        raise UserError("--balanced-sampling is for batches, and --fit logistic has none: use --class-weights")
    if config.loop.balanced_sampling and config.loop.class_weights == "balanced":
        raise UserError("--balanced-sampling and --class-weights balanced do the same twice: choose one")
    if config.augmentation.mixup_alpha or config.augmentation.cutmix_alpha:
        flag = "--mixup-alpha" if config.augmentation.mixup_alpha else "--cutmix-alpha"
        if config.features.uri:
            raise UserError(
                f"{flag} mixes pictures, and --features has what the network makes of each one alone: train "
                "from pictures, or leave it out"
            )
        if config.loop.batch_size == 1:
            raise UserError(f"{flag} mixes the pictures of a batch with each other, and --batch-size 1 has one")
    if config.data.dataset == "images" and not config.data.uri and not config.features.uri:
        raise UserError(
            "--data is needed: the folder or URI of the pictures, with a folder for each class in it"
        )
    if config.data.dataset == "images":
        require_outside(
            config.data.root or config.data.uri,
            storage=storage_root(config.run.storage),
            cache=str(cache_folder(config.data.cache)),
        )
    if config.features.uri and config.data.dataset != "images":
        raise UserError(f"--features is for folders of pictures, not for --dataset {config.data.dataset}")
    if config.data.exclude and config.data.dataset != "images":
        raise UserError(f"--exclude is for folders of pictures, not for --dataset {config.data.dataset}")
    if config.runtime.step_timeout < config.runtime.data_timeout:
        raise UserError(
            f"--step-timeout {config.runtime.step_timeout:g} is below --data-timeout "
            f"{config.runtime.data_timeout:g}: workers would give up on one that waits for its data"
        )
    if config.loop.compile in CUDA_GRAPHS and config.loop.accumulate_steps > 1:
        raise UserError(
            f"--compile {config.loop.compile} replays each forward pass on the same memory, so that gradients "
            "can't be summed over --accumulate-steps: set that to 1, or --compile default"
        )
    if config.loop.compile != "none" and (config.loop.sync_bn or config.loop.grad_checkpointing):
        flag = "--sync-bn" if config.loop.sync_bn else "--grad-checkpointing"
        raise UserError(f"{flag} can't be combined with --compile: leave one of them out")
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0")
    if config.tracking.register:
        if config.tracking.mode == "none" or not config.tracking.log_model:
            lacks = "--tracking none" if config.tracking.mode == "none" else "--no-log-model"
            raise UserError(f"--register needs a model that MLflow has, and {lacks} logs none: leave it out")
        check_registration(config.tracking.register, config.tracking.alias)
    if config.run.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", config.run.name):
        raise UserError(
            f"--name {config.run.name!r}: a name is 1 to 128 letters, digits, dots, hyphens, underscores"
        )


# Flags of the data that may differ from node to node without changing the result.
_OF_THE_NODE = ("cache", "cache_fraction", "decode_workers", "max_bad_fraction")


def learning_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a training's result depends on, by the flags' names, with credentials masked."""
    found: dict[str, Any] = {
        "--features": config.features.uri,
        "--views": config.features.views,
        "--seed": config.run.seed,
    }
    for name in ("data", "augmentation", "model", "optimizer", "loop", "parallel"):
        group = getattr(config, name)
        for one in fields_of(type(group)):
            if one.flag not in _OF_THE_NODE:
                found[dashed(one.flag)] = getattr(group, one.field)
    return {flag: redact(value) if isinstance(value, str) else value for flag, value in found.items()}


def check_registration(name: str, alias: str) -> None:
    """Refuse what MLflow's registry would refuse, before anything is computed.

    Raises:
        UserError: naming the flag.
    """
    if not re.fullmatch(r"[^/:@%'\"\s]{1,250}", name):
        raise UserError(f"--register {name!r}: a name has no slashes, colons, at signs, quotes or spaces")
    if not re.fullmatch(r"[A-Za-z][\w-]{0,99}", alias) or alias == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"--alias {alias!r}: an alias is letters, digits, hyphens, underscores; `latest` and `v1` are taken"
        )
