"""Everything that one worker trains with, and how far the run has come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cvdist import log, models
from cvdist.checkpoints.format import Normalization, OrderIdentity, Progress
from cvdist.checkpoints.worker import Worker
from cvdist.config import TrainConfig
from cvdist.data.dataset import DatasetInfo, Loader
from cvdist.distributed.precision import Precision
from cvdist.parallel import Mode, ParallelPlan
from cvdist.results import Evaluation, ModelIdentity
from cvdist.seeding import derive_seed
from cvdist.startup import Waterfall
from cvdist.tracking.tracker import Tracker
from cvdist.training.finite import LossWatch
from cvdist.training.visualize import Visualizer


@dataclass
class Run:
    """One worker's share of a training run. `cvdist.training.setup.build_run` makes one.

    Attributes:
        config: All settings.
        worker: This process among the workers, and where it stores checkpoints.
        tracker: Where metrics, figures and the model are logged.
        loader: The data, as batches on the worker's device.
        model: The whole model, for pictures. With a split head it has this worker's shards only.
        frozen: The frozen modules that each step has to run first. None if nothing is frozen, or if the batches
            are cached features.
        trained: The trained modules.
        backbone: The trained stages of a pretrained model, which are in `trained`. None if there are none.
        identity: What the model is, for checkpoints and messages.
        order: What has to agree for a position within an epoch to mean the same samples.
        trained_parameters: Number of trained parameters, over all workers.
        frozen_parameters: Number of frozen parameters.
        precision: The number format of forward passes.
        plan: How a step is divided over the workers.
        optimizer: The optimizer of the trained parameters.
        scaler: Scales losses, so that gradients fit float16. In other precisions it does nothing.
        schedule: The learning rate as a function of the epochs done, with fractions within an epoch.
        ema: The exponential moving average of the trained modules. None without `--model-ema-decay`.
        labels: The labels of all training samples by row, on the CPU: int64 (n,), or bool (n, classes).
        class_weights: The weight of each class in the loss, float64 (classes,) on the CPU. None: all are 1.
        losses: The losses of the last steps, to be checked for values that are not finite.
        visualizer: Draws what the network learns.
        start: The phases of the start.
        line: The line on the terminal that shows how far an epoch has come.
        progress: How far the run has come.
        best: The evaluation of the best epoch so far. None before the first one.
        resumed_at: Where the run continues, for the log. Empty if it starts at the beginning.
        made_with: Settings and data that the results depend on, by the names that people know.
        changed: How `made_with` differs from that of the checkpoint that the run continues from, for the log.
        adopted: Whether the run continues from the checkpoint of another run (`--resume`).
        first_step_at: Seconds since 1970 when this process finished its first step. 0 before that.
    """

    config: TrainConfig
    worker: Worker
    tracker: Tracker
    loader: Loader
    model: nn.Module
    frozen: nn.Module | None
    trained: nn.Module
    backbone: nn.Module | None
    identity: ModelIdentity
    order: OrderIdentity
    trained_parameters: int
    frozen_parameters: int
    precision: Precision
    plan: ParallelPlan
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Callable[[float], float]
    ema: AveragedModel | None
    labels: Tensor
    class_weights: Tensor | None
    losses: LossWatch
    visualizer: Visualizer
    line: log.ProgressLine
    start: Waterfall = field(default_factory=Waterfall)
    progress: Progress = field(default_factory=Progress)
    best: Evaluation | None = None
    resumed_at: str = ""
    made_with: dict[str, Any] = field(default_factory=dict)
    changed: str = ""
    adopted: bool = False
    first_step_at: float = 0.0

    @functools.cached_property
    def loss_weights(self) -> Tensor | None:
        """The class weights in float32 on the device."""
        return None if self.class_weights is None else self.class_weights.float().to(self.worker.device)

    @property
    def main(self) -> bool:
        """Whether this worker is the one that reports and stores for all."""
        return self.worker.rank == 0

    @property
    def info(self) -> DatasetInfo:
        """The description of the data set."""
        return self.loader.info

    @property
    def normalization(self) -> Normalization:
        """How pictures are normalized and resized."""
        return Normalization(self.info.mean, self.info.std, self.config.data.resize)

    @property
    def mode(self) -> Mode:
        """The parallel mode."""
        return self.plan.mode

    def evaluated_model(self) -> nn.Module:
        """Return the whole model that is validated and logged: with the averaged weights, if there are any."""
        return models.with_trained(self.model, self.ema.module) if self.ema is not None else self.model

    def evaluated_module(self) -> nn.Module:
        """Return the modules of `evaluated_model` that take the loader's batches, which may be features."""
        if not self.loader.features:
            return self.evaluated_model()
        return self.ema.module if self.ema is not None else self.trained


def initial_model(config: TrainConfig, info: DatasetInfo) -> nn.Module:
    """Build the model that `config` names for the data set, with its initial weights, on the CPU.

    Raises:
        UserError: If the model does not fit the data, or its weights can't be used.
    """
    torch.manual_seed(derive_seed("weights", config.run.seed))
    shape = models.InputSpec(info.channels, info.height, info.width)
    model = models.build_model(config.model, shape, len(info.classes), multilabel=info.multilabel)
    return model.to(memory_format=torch.channels_last) if config.loop.channels_last else model
