"""One training job: all its groups of settings, changed by their flat names, and refused where no run works."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cvdist.config.bounds import check_values
from cvdist.config.groups import (
    CUDA_GRAPHS,
    CheckpointConfig,
    DataConfig,
    FeaturesConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrackingConfig,
    VisualizeConfig,
)
from cvdist.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """One training job, whole. `recipe` names the function in `cvdist.recipes` that it began from."""

    recipe: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    visualize: VisualizeConfig = field(default_factory=VisualizeConfig)


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "features": FeaturesConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "loop": LoopConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "visualize": VisualizeConfig,
}


def replace(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Copy of `config` with fields changed by their flat names, e.g. `replace(c, lr=0.1, epochs=3)`.

    Raises:
        TypeError: for a name that no group has.
    """
    groups = {}
    for name, cls in GROUPS.items():
        mine = {f.name: changes.pop(f.name) for f in dataclasses.fields(cls) if f.name in changes}
        if mine:
            groups[name] = dataclasses.replace(getattr(config, name), **mine)
    if "recipe" in changes:
        groups["recipe"] = changes.pop("recipe")
    if changes:
        raise TypeError(f"no such fields: {', '.join(changes)}")
    return dataclasses.replace(config, **groups)


def flat(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Each field as (`group.name`, value), in the order of their definition."""
    yield "recipe", config.recipe
    for group in GROUPS:
        for name, value in dataclasses.asdict(getattr(config, group)).items():
            yield f"{group}.{name}", value


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested dictionary, for JSON and for Ray's `train_loop_config`."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`."""
    groups = {name: cls(**values[name]) for name, cls in GROUPS.items()}
    return TrainConfig(recipe=values["recipe"], **groups)


def check(config: TrainConfig) -> None:
    """Refuse values that no run can work with, before anything is started.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    for group in GROUPS:
        check_values(getattr(config, group))
    config.runtime.worker_range  # noqa: B018 (raises)
    if config.data.dataset == "images" and not config.data.data and not config.features.features:
        raise UserError(
            "--data is needed: the folder or URI of the pictures, with a folder for each class in it"
        )
    if config.features.features and config.data.dataset != "images":
        raise UserError(f"--features is for folders of pictures, not for --dataset {config.data.dataset}")
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
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0")
    if config.tracking.register:
        if config.tracking.tracking == "none" or not config.tracking.log_model:
            lacks = "--tracking none" if config.tracking.tracking == "none" else "--no-log-model"
            raise UserError(f"--register needs a model that MLflow has, and {lacks} logs none: leave it out")
        check_registration(config.tracking.register, config.tracking.alias)
    if config.checkpoint.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", config.checkpoint.name):
        raise UserError(
            f"--name {config.checkpoint.name!r}: a name is 1 to 128 letters, digits, dots, hyphens, underscores"
        )


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
