"""Builds a `Run`: prepares the data, builds the model, and restores the newest checkpoint if there is one."""

from __future__ import annotations

import functools
import logging

import torch

from cvdist import config as configs
from cvdist import loaders, log, models, parallel
from cvdist.checkpoints.format import OrderIdentity
from cvdist.checkpoints.worker import Worker
from cvdist.config import TrainConfig
from cvdist.data.dataset import Loader
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.device import be_deterministic
from cvdist.distributed.precision import choose_precision
from cvdist.distributed.sync_batch_norm import synchronize
from cvdist.errors import UserError
from cvdist.results import ModelIdentity
from cvdist.seeding import derive_seed
from cvdist.startup import Waterfall
from cvdist.tracking.tracker import Tracker
from cvdist.training import backbone, checkpointing, compiling, ema, imbalance, logistic_head, memory
from cvdist.training.finite import LossWatch
from cvdist.training.optimizer import build_optimizer
from cvdist.training.run import Run, initial_model
from cvdist.training.schedule import learning_rate
from cvdist.training.visualize import Visualizer

logger = logging.getLogger(__name__)


def build_run(
    config: TrainConfig,
    worker: Worker,
    tracker: Tracker,
    start: Waterfall | None = None,
    *,
    prepared: bool = False,
) -> Run:
    """Prepare this node and build the run, restored from its newest checkpoint. All workers must call this.

    Args:
        config: All settings.
        worker: This process among the workers.
        tracker: Where the run is logged.
        start: The phases of the start so far.
        prepared: Whether data and weights are ready on the machine of rank 0.

    Raises:
        UserError: On all workers, if the data, the model or the checkpoint are not what the settings say.
    """
    start = start or Waterfall()
    _prepare_node(config, worker, prepared=prepared)
    start.end("prepare")
    with memory.explain_full_memory(worker.device, memory.SETUP_ADVICE):
        return open_run(config, worker, tracker, start)


def _prepare_node(config: TrainConfig, worker: Worker, *, prepared: bool) -> None:
    """Download or decode what all workers of a node share, on one of them, while the others wait.

    Raises:
        UserError: On all workers, if the data or the pretrained weights can't be had.
    """
    with raise_on_all_ranks(config.runtime.prepare_timeout):
        if worker.local_rank == 0 and not (prepared and worker.rank == 0):
            loaders.prepare(config)
            models.prepare(config.model)


def open_run(config: TrainConfig, worker: Worker, tracker: Tracker, start: Waterfall | None = None) -> Run:
    """Build the run on a node that is prepared. All workers must call this.

    Args:
        config: All settings.
        worker: This process among the workers.
        tracker: Where the run is logged.
        start: The phases of the start.

    Raises:
        UserError: On all workers, if the data, the model or the checkpoint are not what the settings say.
    """
    start = start or Waterfall()
    device, main = worker.device, worker.rank == 0
    precision = choose_precision(config.loop.precision, device, training=True)
    if config.loop.deterministic:
        be_deterministic(device)
    with raise_on_all_ranks():
        expected = models.preprocessing(config.model)
        loader = loaders.open_loader(
            config,
            device,
            workers_on_node=worker.local_world_size,
            normalization=(expected.mean, expected.std) if expected else None,
        )
        start.end("loader")
        labels = loader.labels("train")
        weights = imbalance.class_weights(config.loop, loader.info.classes, labels)
        model = initial_model(config, loader.info)
        visualizer = Visualizer(config, model, tracker, enabled=main)
        modules = models.frozen_and_trained(model)
        backbone.prepare(config, modules)
        loaders.check_labels(config, multilabel=loader.info.multilabel)
        if config.loop.select_by == "auto":
            usual = "mean_average_precision" if loader.info.multilabel else "accuracy"
            config = configs.replace(config, select_by=usual)
    digest = _require_same_data(loader)
    # A cache has the features that the frozen modules compute, so they are not run and stay on the CPU.
    frozen = None if loader.features else modules.frozen
    modules.trained.to(device)
    if frozen is not None:
        frozen.to(device)
    # Counted here, because splitting the head leaves only a shard of it.
    trained_parameters = sum(p.numel() for p in modules.trained.parameters())
    all_parameters = sum(p.numel() for p in model.parameters())
    with checkpointing.open_newest(config, worker) as found:
        plan = parallel.choose_plan(
            config.parallel,
            config.loop.batch_size,
            worker,
            modules,
            loader,
            precision,
            recorded=found.checkpoint.parallel if found else "",
        )
        if config.loop.sync_bn:
            with raise_on_all_ranks():
                synchronize(modules.trained, plan.mode.traffic, plan.mode.world_size)
        # Split layers are not compiled: they contain exchanges with other workers.
        compiled = [frozen, modules.trained if plan.mode.name == "data" else None]
        compiling.compile_modules(config.loop.compile, *compiled)
        decay = config.loop.model_ema_decay
        run = Run(
            config=config,
            worker=worker,
            tracker=tracker,
            loader=loader,
            model=model,
            frozen=frozen,
            trained=modules.trained,
            backbone=modules.backbone,
            identity=_identity(config, loader),
            made_with={
                **configs.learning_settings(config),
                "training pictures": loader.info.train_size,
                "validation pictures": loader.info.valid_size,
                "their SHA-256": digest[:16],
            },
            order=OrderIdentity(loader.info.train_size, config.run.seed),
            trained_parameters=trained_parameters,
            frozen_parameters=all_parameters - trained_parameters,
            precision=precision,
            plan=plan,
            optimizer=build_optimizer(modules.trained, config.optimizer, stages=modules.stages),
            scaler=precision.scaler(),
            schedule=functools.partial(learning_rate, config.optimizer, config.loop.epochs),
            ema=ema.build(modules.trained, decay) if decay else None,
            labels=labels,
            class_weights=weights,
            losses=LossWatch(functools.partial(loader.names, "train")),
            visualizer=visualizer,
            line=log.ProgressLine(logger, enabled=main),
            start=start,
        )
        # The weights were drawn from a stream that all workers share. Dropout is drawn from one of each
        # worker's.
        torch.manual_seed(derive_seed("dropout", config.run.seed, plan.mode.random_rank))
        if found is not None:
            with raise_on_all_ranks():
                checkpointing.restore(run, found)
    logistic_head.require_linear(run)
    start.end("model")
    return run


def _identity(config: TrainConfig, loader: Loader) -> ModelIdentity:
    info = loader.info
    shape = models.InputSpec(info.channels, info.height, info.width)
    return models.identity_of(config.model, info.classes, shape, multilabel=info.multilabel)


def _require_same_data(loader: Loader) -> str:
    """Make sure that a row means the same picture on all workers, because each node lists the data by itself.

    Returns:
        The digest of the data.

    Raises:
        UserError: On all workers, if they see different data.
    """
    info = loader.info
    seen = gather((info.train_size, info.valid_size, loader.digest()))
    if len(set(seen)) > 1:
        raise UserError(
            f"the workers see different data in {info.source}: "
            + ", ".join(f"{train:,} + {valid:,} pictures ({sha[:8]})" for train, valid, sha in seen)
            + "; was it changed while the job started? Start it again",
            on_all_workers=True,
        )
    return seen[0][2]
