"""Workers started by Ray Train V2."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from cvdist import config as configs
from cvdist import log
from cvdist.config import TrainConfig, storage_root
from cvdist.errors import UserError
from cvdist.runtime.ray_cluster import require_resources
from cvdist.tracking import RunRef, open_tracker
from cvdist.training.loop import Summary, TrainingLoop

logger = logging.getLogger(__name__)

_SCORE = "score"


@dataclass
class RayWorker:
    """A Ray Train worker; Ray keeps the checkpoints (`cvdist.runtime.worker.Worker`)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: torch.device

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker.latest_checkpoint`."""
        with _opened(ray.train.get_checkpoint()) as folder:
            yield folder

    @contextmanager
    def best_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker.best_checkpoint`."""
        reported = ray.train.get_all_reported_checkpoints()
        best = max(reported, key=lambda item: item.metrics[_SCORE], default=None)
        with _opened(best.checkpoint if best else None) as folder:
            yield folder

    def report(self, name: str, score: float, folder: Path | None) -> None:
        """See `Worker.report`."""
        saved = ray.train.Checkpoint.from_directory(folder) if folder is not None else None
        ray.train.report({_SCORE: score}, checkpoint=saved, checkpoint_dir_name=name)


@contextmanager
def _opened(checkpoint: ray.train.Checkpoint | None) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def fit(config: TrainConfig, ref: RunRef | None) -> Summary:
    """Train on the connected cluster; Ray restarts failed workers from the latest checkpoint.

    Raises:
        UserError: if the cluster is too small, or for what a worker found to be the user's to mend.
    """
    use_gpu = require_resources(config)
    runtime = config.runtime
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(runtime.start_timeout))
    resources = {"CPU": float(runtime.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": configs.to_dict(config), "run": ref.to_dict() if ref else None},
        torch_config=TorchConfig(timeout_s=int(runtime.collective_timeout)),
        scaling_config=ScalingConfig(
            num_workers=runtime.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=config.checkpoint.name,
            storage_path=storage_root(config),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(
                max_failures=runtime.max_failures, controller_failure_limit=runtime.max_failures
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.checkpoint.keep_checkpoints,
                checkpoint_score_attribute=_SCORE,
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    if isinstance(outcome, str):
        raise UserError(outcome)
    return outcome


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """The `UserError` behind a failed training, if there is one."""
    failures = getattr(error, "worker_failures", {})
    return next((UserError(str(f)) for f in failures.values() if isinstance(f, UserError)), error)


def _work(values: dict[str, Any]) -> Summary | str:
    """What each Ray worker runs. What no restart would mend is returned as a message instead of raised."""
    log.setup()
    logging.getLogger().setLevel(logging.WARNING)  # not two lines of Ray for each checkpoint of each rank
    config = configs.from_dict(values["config"])
    context = ray.train.get_context()
    worker = RayWorker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node=f"node-{context.get_node_rank()}",
        device=get_device(),
    )
    ref = RunRef(**values["run"]) if values["run"] else None
    tracker = open_tracker(ref, worker.rank, worker.local_rank, worker.node)
    try:
        return TrainingLoop(config, worker, tracker).run()
    except UserError as error:
        if error.on_all_workers:
            return str(error)
        raise
    finally:
        tracker.close()
