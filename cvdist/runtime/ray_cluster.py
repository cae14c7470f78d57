"""Workers started by Ray Train V2: on a cluster, or on this machine alone."""

from __future__ import annotations

import logging
import os
import socket
import time
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


def connect(config: TrainConfig) -> int:
    """Join the cluster of RAY_ADDRESS or of the submitted job, or start Ray on this machine.

    Returns the number of the cluster's nodes.

    Raises:
        UserError: if there is no cluster at RAY_ADDRESS, or it is too small for the configuration.
    """
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _require_listener(address, config.runtime.connect_timeout)
            ray.init(address=address, **options)
        else:
            # Ray Train asks the dashboard's state API whether its controller lives; without one it complains.
            ray.init(address="local", include_dashboard=True, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"could not connect to {where}: {first}") from error
    require_resources(config)
    return sum(node["Alive"] for node in ray.nodes())


def _require_listener(address: str, timeout: float) -> None:
    """Ray itself would try for minutes to reach a cluster that is not there.

    Raises:
        UserError: naming the address and the setting.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`, `local`: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} within {timeout:g} s (--connect-timeout): "
            f"{error.strerror or error}. Correct it, or unset it to use this machine alone"
        ) from error


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


def require_resources(config: TrainConfig) -> bool:
    """Whether the workers use GPUs; waits `--resource-timeout` seconds for an autoscaler to bring what lacks.

    Raises:
        UserError: if the cluster has too few CPUs or GPUs, saying how many it has.
    """
    runtime = config.runtime
    deadline = time.monotonic() + runtime.resource_timeout
    while True:
        have = ray.cluster_resources()
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        use_gpu = runtime.device == "cuda" or (runtime.device == "auto" and gpus >= runtime.workers)
        lacking = _lacking(config, cpus, gpus, use_gpu)
        if not lacking:
            return use_gpu
        if time.monotonic() >= deadline:
            raise UserError(lacking)
        logger.info("waiting for nodes: %s", lacking)
        ray.autoscaler.sdk.request_resources(  # a no-op where nothing scales
            bundles=[{"CPU": runtime.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}] * runtime.workers
        )
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def _lacking(config: TrainConfig, cpus: float, gpus: float, use_gpu: bool) -> str:
    """What the cluster has too little of, as one line; empty if it is large enough."""
    runtime = config.runtime
    nodes = sum(node["Alive"] for node in ray.nodes())
    has = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {nodes} node{'s' if nodes != 1 else ''}"
    if use_gpu and gpus < runtime.workers:
        return (
            f"--workers {runtime.workers} --device cuda needs {runtime.workers} GPUs, {has}: "
            "lower --workers, or set --resource-timeout to wait for an autoscaler"
        )
    needed = runtime.workers * runtime.cpus_per_worker
    if cpus < needed:
        return (
            f"--workers {runtime.workers} with --cpus-per-worker {runtime.cpus_per_worker} needs {needed} "
            f"CPUs, {has}: lower --workers, or set --resource-timeout to wait for an autoscaler"
        )
    return ""


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
