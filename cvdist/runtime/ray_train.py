"""Workers that Ray Train V2 starts, and restarts when some of them are lost.

Ray starts, watches and restarts processes, and tells of nodes that will be taken away. It is not told of
checkpoints: `ray.train.report` makes all workers wait, up to two seconds, until Ray's controller has taken the
report before. The run's own store has them, and restarted workers list them there.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from cvdist import log, storage
from cvdist.config import TrainConfig, storage_root
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import UserError
from cvdist.runtime.ray_cluster import ResourceRequest, address, reconnect, require_resources

logger = logging.getLogger(__name__)

T = TypeVar("T")
WorkerFunction = Callable[[RankInfo, Callable[[], StopRequest]], T]
"""What each worker runs, with its ranks, and a function that tells what Ray asks of the run. Every worker calls
that function after the same steps."""

_TRIAL_SECONDS = 30.0
_LOST_PEER = r"(?i)connection (closed|reset|refused)|timed out|broken pipe|gloo|NCCL|process group"


def fit(config: TrainConfig, work: WorkerFunction[T]) -> T:
    """Run `work` on the connected cluster's workers, which join one process group.

    Workers that are lost, or raise an error, are all started again, up to `--max-failures` times.

    Args:
        config: Says how many workers, on which devices, and how long to wait for what.
        work: The function that is sent to the workers. It opens all that it needs itself.

    Returns:
        What `work` returns on rank 0.

    Raises:
        UserError: If the cluster is too small, or `work` raises one that a restart would not cure.
    """
    use_gpu = require_resources(ResourceRequest.of_workers(config.runtime))
    runtime = config.runtime
    fewest, most = runtime.worker_range
    # Where the number of workers may vary, Ray first tries with all nodes it knows, even one that is lost.
    start_timeout = runtime.start_timeout if fewest == most else min(runtime.start_timeout, _TRIAL_SECONDS)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start_timeout))
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(runtime.collective_timeout))
    # A cluster of this machine alone is never preempted, and the watcher's process takes seconds to import.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if address() else "0"
    # Ray Train's controller waits for this actor. Started here, the actor starts while the controller does.
    get_or_create_autoscaling_coordinator()
    filesystem, root = storage.locate(storage_root(config.run.storage), patient=True)
    make = functools.partial(
        _Trainer,
        functools.partial(_run, work, config.checkpoint.grace_period),
        torch_config=TorchConfig(timeout_s=int(runtime.collective_timeout)),
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": float(runtime.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {}),
            elastic_resize_monitor_interval_s=runtime.resize_interval,
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=root,  # where Ray keeps its notes of the run
            storage_filesystem=filesystem,  # with this project's bounds and retries
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[FailureLines()],
            failure_config=FailureConfig(
                max_failures=runtime.max_failures,
                controller_failure_limit=0,  # see `_fit`
                max_preemption_failures=runtime.max_preemptions,
            ),
        ),
    )
    try:
        value, error = _fit(config, make)
    except ray.train.TrainingFailedError as failed:
        raise cause_of(failed) from failed
    if error:
        raise UserError(error)
    result: T = value
    return result


class _Trainer(TorchTrainer):
    """A trainer without two of Ray's processes that take seconds to import and would have nothing to do.

    One divides Ray's own data sets. The other frees what a dead controller held, and is left out only where the
    cluster ends with this job.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback,) if address() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, idle)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to Python, which raises KeyboardInterrupt: Ray's handler ends a job without a word."""


def _fit(config: TrainConfig, make: Callable[[], TorchTrainer]) -> Any:
    """Run Ray Train and return what the workers return.

    Ray itself restarts workers that fail. Where one dies while all are being started, it goes on holding the
    CPUs of those that it has started, gives up, or waits for as many CPUs again; nor does it restart its own
    controller. After any of these, a new trainer in a new job of Ray's, whose end frees all that the old one
    held, goes on from the last checkpoint, up to `--max-failures` times.

    Raises:
        TrainingFailedError: For all other failures.
    """
    failures = config.runtime.max_failures
    for failed in range(1, failures + 2):
        try:
            return make().fit().return_value
        except (ray.train.ControllerError, RayActorError) as error:
            if failed > failures:
                raise
            why = str(getattr(error, "controller_failure", error)).strip().partition("\n")[0]
        logger.warning(
            "Ray Train could not start or watch the workers (%s): once more (%d of %d, --max-failures)",
            why,
            failed,
            failures,
        )
        reconnect(config.runtime.connect_timeout)
    raise AssertionError


class FailureLines(UserCallback):
    """Says in one line which worker failed and why, in Ray's controller, which then starts all again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Log one failure: a worker's own, if there is one, and no lost connection to another worker."""
        log.setup()
        rank, error = min(
            worker_exceptions.items(), key=lambda item: (bool(re.search(_LOST_PEER, str(item[1]))), item[0])
        )
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # The last line of a traceback is the error.
        why = lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
        logger.warning("failure    of worker %d: %s", rank, why[:300])


def cause_of(error: ray.train.TrainingFailedError) -> Exception:
    """Return the `UserError` behind a failed training, if there is one, else the error that a worker died of.

    When one worker dies, the others report lost connections: its own error is the one to show.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        if isinstance(failure, UserError):
            return UserError(str(failure))
    own = [failure for failure in failures if not re.search(_LOST_PEER, str(failure))]
    return (own or [getattr(error, "controller_failure", error)])[0]


def _run(work: WorkerFunction[T], grace_period: float) -> tuple[T | None, str]:
    """Run `work` in a Ray worker. Returns its result, or the message of an error that would come again."""
    log.setup()
    logging.getLogger().setLevel(logging.WARNING)  # Ray's own notes stay out of the job's log
    context = ray.train.get_context()
    ranks = RankInfo(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node=f"node-{context.get_node_rank()}",
        device=get_device(),
    )
    try:
        return work(ranks, PreemptionNotices(ranks.rank, grace_period).poll), ""
    except UserError as error:
        if error.on_all_workers and not error.transient:
            return None, str(error)
        raise


class PreemptionNotices:
    """Asks for a checkpoint when Ray tells that nodes will be taken away."""

    def __init__(self, rank: int, grace_period: float) -> None:
        """Prepare to look for notices.

        Args:
            rank: Rank of this worker; rank 0 logs the notices.
            grace_period: How many seconds before the nodes go the last checkpoint is begun.
        """
        self._rank, self._grace_period = rank, grace_period
        self._seen: set[tuple[str, ...]] = set()
        self._deadlines: dict[int, float] = {}

    def poll(self) -> StopRequest:
        """Return CHECKPOINT once when a notice arrives and once more shortly before the nodes go, else NONE.

        All workers call it. The run goes on until Ray restarts it on the nodes that are left: if it returned,
        it would count as finished, and if it raised, as failed.
        """
        info = ray.train.get_preemption_info()
        if info is None:
            return StopRequest.NONE
        due = [("notice", *info.preempted_node_ids)]
        if info.deadline_ms is not None:
            # Ray names a time of day; the clock may be set before it comes.
            new_deadline = time.monotonic() + info.deadline_ms / 1000 - time.time()
            left = self._deadlines.setdefault(info.deadline_ms, new_deadline) - time.monotonic()
            if left < self._grace_period:
                due.append(("deadline", *info.preempted_node_ids))
            if self._rank == 0 and due[0] not in self._seen:
                logger.warning(
                    "nodes with %d of the workers will be taken away in %s: saving",
                    len(info.preempted_ranks),
                    log.duration(left),
                )
        new = set(due) - self._seen
        self._seen |= new
        return StopRequest.CHECKPOINT if new else StopRequest.NONE
