"""Workers started by Ray Train V2."""

from __future__ import annotations

import functools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from cvdist import config as configs
from cvdist import log, storage
from cvdist.checkpoints.fence import Fence, FenceWatch
from cvdist.checkpoints.format import META
from cvdist.checkpoints.store import complete_checkpoints
from cvdist.checkpoints.uploads import Uploads
from cvdist.config import TrainConfig, storage_root
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.consensus import StopConsensus
from cvdist.distributed.worker import StopRequest
from cvdist.errors import Superseded, UserError
from cvdist.results import Summary
from cvdist.runtime.ray_cluster import reconnect, require_resources
from cvdist.tracking import Attempt, RunRef, open_tracker
from cvdist.training.train import TrainingLoop

logger = logging.getLogger(__name__)

_SCORE, _AT = "score", "samples"
_TRIAL_SECONDS = 30.0
_AGREE_SECONDS = 2.0  # each time, all workers also ask a Ray actor
_LOST_PEER = r"(?i)connection (closed|reset|refused)|timed out|broken pipe|gloo|NCCL|process group"


@dataclass
class RayWorker:
    """A Ray Train worker; Ray keeps the checkpoints (`cvdist.distributed.worker.Worker`)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: torch.device
    config: TrainConfig
    fence: Fence | None
    """Of this attempt; rank 0 has it."""

    def __post_init__(self) -> None:
        """Nothing is on its way yet."""
        self._uploads = Uploads(self.config.checkpoint.checkpoint_timeout)
        self._consensus = StopConsensus(_AGREE_SECONDS, self.config.runtime.step_timeout)
        self._watch = FenceWatch(self.fence) if self.fence is not None else None
        self._known: dict[str, ray.train.Checkpoint] = {}
        self._notices: set[tuple[str, ...]] = set()
        self._deadlines: dict[int, float] = {}

    def checkpoints(self) -> Sequence[str]:
        """See `Worker.checkpoints`."""
        self._adopt()
        reported = sorted(self._reported(), key=lambda item: item.metrics.get(_AT, 0), reverse=True)
        self._known = {Path(item.checkpoint.path).name: item.checkpoint for item in reported}
        return list(self._known)

    @contextmanager
    def open_checkpoint(self, name: str) -> Iterator[Path]:
        """See `Worker.open_checkpoint`."""
        try:
            with self._known[name].as_directory() as folder:
                yield Path(folder)
        except FileNotFoundError:
            with tempfile.TemporaryDirectory() as empty:
                yield Path(empty)

    @contextmanager
    def open_best_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker.open_best_checkpoint`."""
        best = max(self._reported(), key=lambda item: item.metrics[_SCORE], default=None)
        if best is None:
            yield None
            return
        with best.checkpoint.as_directory() as folder:
            yield Path(folder)

    def save_checkpoint(
        self,
        name: str,
        score: float,
        at: int,
        fill: Callable[[Path], None] | None,
        awaited: Sequence[str] = (),
    ) -> None:
        """See `Worker.save_checkpoint`; a thread of Ray's writes and uploads rank 0's."""
        settings = self.config.checkpoint
        saved = upload = None
        with raise_on_all_ranks(settings.checkpoint_timeout):
            self._uploads.wait()
        suffix = self.fence.suffix if self.fence is not None else ""
        if awaited:
            suffix = gather(suffix)[0]
        place = ray.train.get_context().get_storage()
        target = ray.train.Checkpoint(f"{place.experiment_fs_path}/{name}{suffix}", place.storage_filesystem)
        if fill is not None and self.rank == 0:
            saved = target
            done = self._uploads.expect()

            def upload(checkpoint: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
                self._uploads.run(lambda: self._store(checkpoint, fill, awaited), done)
                try:
                    done.result()  # Ray, too, is to know of an error
                except Superseded as error:
                    if not error.on_all_workers or not settings.async_checkpoints:
                        raise
                    # But of none that a restart can't mend: the workers learn of it and end by themselves.
                    raise SystemExit from error
                return checkpoint

        elif fill is not None:
            self._uploads.start(lambda: self._store_part(target, fill))

        ray.train.report(
            {_SCORE: score, _AT: at},
            checkpoint=saved,
            checkpoint_dir_name=Path(saved.path).name if saved is not None else name,
            checkpoint_upload_mode=(
                CheckpointUploadMode.ASYNC if settings.async_checkpoints else CheckpointUploadMode.SYNC
            ),
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
        )

    def wait_for_uploads(self) -> None:
        """See `Worker.wait_for_uploads`."""
        with raise_on_all_ranks(self.config.checkpoint.checkpoint_timeout):
            self._uploads.wait()

    def poll_stop_request(self) -> StopRequest:
        """See `Worker.poll_stop_request`."""
        if not self._consensus.due():
            return StopRequest.NONE
        mine = self._preempted()
        if self._watch is not None and self._watch.superseded:
            mine = StopRequest.ABORT
        return self._consensus.agree(mine)

    def _preempted(self) -> StopRequest:
        """SAVE, once when a notice arrives and once more shortly before the node goes. All workers call it.

        A run that returned would count as finished, and one that raised as failed: it goes on until Ray
        restarts it on the nodes that are left.
        """
        info = ray.train.get_preemption_info()
        if info is None:
            return StopRequest.NONE
        due = [("notice", *info.preempted_node_ids)]
        if info.deadline_ms is not None:
            # Ray names a time of day; the clock may be set before it comes.
            new_deadline = time.monotonic() + info.deadline_ms / 1000 - time.time()
            left = self._deadlines.setdefault(info.deadline_ms, new_deadline) - time.monotonic()
            if left < self.config.checkpoint.grace_period:
                due.append(("deadline", *info.preempted_node_ids))
            if self.rank == 0 and due[0] not in self._notices:
                logger.warning(
                    "nodes with %d of the workers will be taken away in %s: saving",
                    len(info.preempted_ranks),
                    log.duration(left),
                )
        new = set(due) - self._notices
        self._notices |= new
        return StopRequest.CHECKPOINT if new else StopRequest.NONE

    def _store(
        self, checkpoint: ray.train.Checkpoint, fill: Callable[[Path], None], awaited: Sequence[str]
    ) -> None:
        assert self.fence is not None
        ensure_current = self.fence.require_newest
        if awaited:
            self._store_part(checkpoint, fill, awaited, ensure_current)
        else:
            with _naming(checkpoint):
                storage.publish(
                    checkpoint.filesystem, checkpoint.path, fill, last=META, ensure_current=ensure_current
                )
        ensure_current()  # Ray lists it next

    def _store_part(
        self,
        checkpoint: ray.train.Checkpoint,
        fill: Callable[[Path], None],
        awaited: Sequence[str] = (),
        ensure_current: Callable[[], None] = lambda: None,
    ) -> None:
        """This worker's files: attempts have folders of their own, so only rank 0 has to check."""
        with _naming(checkpoint):
            storage.publish_files(
                checkpoint.filesystem,
                checkpoint.path,
                fill,
                awaited=awaited,
                last=META,
                timeout=self.config.checkpoint.checkpoint_timeout,
                ensure_current=ensure_current,
            )

    def _adopt(self) -> None:
        """Tell Ray of what earlier attempts stored and died of before it heard; all workers call it.

        Only of what is newer than all that Ray knows: the rest is what it no longer keeps.
        """
        place = ray.train.get_context().get_storage()
        newest = max((item.metrics.get(_AT, 0) for item in self._reported()), default=-1)
        with raise_on_all_ranks(self.config.checkpoint.checkpoint_timeout):
            mine = complete_checkpoints(self.fence.folder) if self.fence is not None else []
        for name, score, at in gather([one for one in mine if one.at > newest])[0]:
            path = f"{place.experiment_fs_path}/{name}"
            ray.train.report(
                {_SCORE: score, _AT: at},
                checkpoint=ray.train.Checkpoint(path, place.storage_filesystem) if self.rank == 0 else None,
                checkpoint_dir_name=name,
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            )

    def _reported(self) -> list[Any]:
        return list(
            ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED,
                timeout_s=self.config.checkpoint.checkpoint_timeout,
            )
        )


@contextmanager
def _naming(checkpoint: ray.train.Checkpoint) -> Iterator[None]:
    """Storage errors in the block say which checkpoint they are about."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the checkpoint {checkpoint.path} could not be stored: {storage.reason(error)}"
        ) from error


def fit(config: TrainConfig, ref: RunRef | None, fence: Fence) -> Summary:
    """Train on the connected cluster; Ray restarts failed workers from the latest checkpoint.

    fence: of this job.

    Raises:
        UserError: if the cluster is too small, or for what a worker found to be the user's to mend.
    """
    use_gpu = require_resources(config)
    runtime = config.runtime
    fewest, most = runtime.worker_range
    # Where the number may vary, Ray first tries with what it believes to have, a lost node included.
    start_timeout = runtime.start_timeout if fewest == most else min(runtime.start_timeout, _TRIAL_SECONDS)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start_timeout))
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(config.checkpoint.checkpoint_timeout + 60))
    resources = {"CPU": float(runtime.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {})
    filesystem, root = storage.locate(storage_root(config), patient=True)
    make = functools.partial(
        TorchTrainer,
        _work,
        train_loop_config={
            "config": configs.to_dict(config),
            "run": ref.to_dict() if ref else None,
            "fence": {"uri": fence.folder.uri, "name": fence.name},
        },
        torch_config=TorchConfig(timeout_s=int(runtime.collective_timeout)),
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=runtime.resize_interval,
        ),
        run_config=RunConfig(
            name=config.checkpoint.name,
            storage_path=root,
            storage_filesystem=filesystem,  # with this project's bounds and retries
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(
                max_failures=runtime.max_failures,
                controller_failure_limit=0,  # see `_fit`
                max_preemption_failures=runtime.max_preemptions,
            ),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.checkpoint.keep_checkpoints,
                checkpoint_score_attribute=_SCORE,
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        outcome = _fit(config, make)
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    if isinstance(outcome, str):
        raise UserError(outcome)
    return outcome


def _fit(config: TrainConfig, make: Callable[[], TorchTrainer]) -> Any:
    """What the workers return.

    Ray itself restarts workers that fail. Where one dies while all are being started, it goes on holding the
    CPUs of those that it has started, gives up, or waits for as many CPUs again; nor does it restart its own
    controller. After any of these, a new trainer in a new job of Ray's, whose end frees all that the old one
    held, goes on from the last checkpoint, up to `--max-failures` times.

    Raises:
        TrainingFailedError: for all else.
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
        reconnect(config)
    raise AssertionError


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """The `UserError` behind a failed training, if there is one; else what a worker died of.

    When one worker dies, the others report lost connections: its own error is the one to show.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        if isinstance(failure, UserError):
            return UserError(str(failure))
    own = [failure for failure in failures if not re.search(_LOST_PEER, str(failure))]
    return (own or [getattr(error, "controller_failure", error)])[0]


def _work(values: dict[str, Any]) -> Summary | str:
    """What each Ray worker runs. What no restart would mend is returned as a message instead of raised."""
    log.setup()
    logging.getLogger().setLevel(logging.WARNING)  # not two lines of Ray for each checkpoint of each rank
    config = configs.from_dict(values["config"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    fence = None
    try:
        with raise_on_all_ranks():
            if rank == 0:
                folder = storage.Folder.open(values["fence"]["uri"], "--storage", patient=True)
                fence = Fence(folder, values["fence"]["name"], 0).claim_attempt()
        number = gather(fence.number if fence else 0)[0]
        worker = RayWorker(
            rank=rank,
            world_size=context.get_world_size(),
            local_rank=context.get_local_rank(),
            local_world_size=context.get_local_world_size(),
            node=f"node-{context.get_node_rank()}",
            device=get_device(),
            config=config,
            fence=fence,
        )
        ref = RunRef(**values["run"]) if values["run"] else None
        attempt = Attempt(number, fence.require_newest) if fence else None
        tracker = open_tracker(ref, worker.rank, worker.local_rank, worker.node, attempt)
        try:
            return TrainingLoop(config, worker, tracker).run()
        finally:
            tracker.close()
    except UserError as error:
        if error.on_all_workers:
            return str(error)
        raise
