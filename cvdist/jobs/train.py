"""From a configuration to a finished run: choose the runtime, open the MLflow run, train, end the run."""

from __future__ import annotations

import functools
import importlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvdist import config as configs
from cvdist import log, startup, storage, tracking
from cvdist.checkpoints.fence import Fence
from cvdist.config import TrainConfig, storage_root
from cvdist.errors import UserError
from cvdist.jobs import console
from cvdist.runtime.environment import choose_launcher, require_ray
from cvdist.runtime.signals import sigterm_raises
from cvdist.startup import Waterfall
from cvdist.tracking import Attempt, RunRef, Tracker, environment, open_tracker

if TYPE_CHECKING:
    from cvdist.checkpoints.worker import Worker
    from cvdist.distributed.ranks import RankInfo
    from cvdist.distributed.stop_request import StopRequest
    from cvdist.results import Summary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Args:
        name: name of the run.
        summary: what the training loop says of the run.
        run: the MLflow run; None without one.
        storage: folder or URI of the runs.
        seconds: from the process's start to the end.
        seconds_to_first_step: from the process's start.
        registered: the version in MLflow's registry and its alias, if asked for.
        not_registered: why no version was registered, if one was asked for.
    """

    name: str
    summary: Summary
    run: RunRef | None
    storage: str
    seconds: float
    seconds_to_first_step: float
    registered: str = ""
    not_registered: str = ""


@dataclass(frozen=True)
class ParentJob:
    """The longer job that a training is a part of. tags: for its MLflow run; began: seconds since 1970."""

    tags: Mapping[str, str]
    began: float


def train(config: TrainConfig, part: ParentJob | None = None) -> TrainResult | None:
    """Train as `config` says; `part` where this is a part of a longer job.

    Returns None on all workers but the first, under torchrun.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM, after the MLflow run was ended as killed.
    """
    configs.check(config)
    config = absolute(config)
    runtime = choose_launcher(config.runtime.launcher)
    began = time.monotonic() - (time.time() - part.began) if part else startup.BEGAN
    part = part or ParentJob({}, startup.BEGAN_AT)
    with sigterm_raises():
        finished = _on_ray(config, part) if runtime == "ray" else _in_processes(config, part)
    if finished is None:
        return None
    name, summary, run = finished
    registered, not_registered = _register(config, summary, run)
    seconds, first_step = time.monotonic() - began, _seconds_to_first_step(summary, part)
    return TrainResult(
        name, summary, run, storage_root(config.run.storage), seconds, first_step, registered, not_registered
    )


def _on_ray(config: TrainConfig, part: ParentJob) -> tuple[str, Summary, RunRef | None]:
    """Train with Ray workers. This process is the driver: it owns the MLflow run, which the workers fill."""
    require_ray("start with torchrun --nproc-per-node N jobs/train.py ... or use --runtime inline")
    from cvdist.runtime import ray_cluster
    from cvdist.runtime.ray_cluster import ResourceRequest

    config, start = named(config), Waterfall()
    start.end("imports")
    here = not ray_cluster.address()
    check_here(config, data_is_here=here)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Ray takes seconds to start, and so do MLflow and Ray Train to import: side by side.
        opening = pool.submit(open_all, config, data_is_here=here)
        pool.submit(importlib.import_module, "cvdist.runtime.ray_train")
        nodes = ray_cluster.connect(ResourceRequest.of_workers(config.runtime))
        store = opening.result()
    from cvdist.runtime import ray_train

    start.end("ray and data" if here else "ray")
    run, job = _start(config, store, tags=part.tags)
    with _told_on_interrupt(config.run.name, part), tracking.end_run_on_exit(run):
        if run is not None:
            run.require_reachable_from(nodes)
        start.end("run")
        where = "this machine" if here else f"a cluster of {nodes} node{'s' if nodes != 1 else ''}"
        logger.info("ray        on %s, starting %s workers", where, config.runtime.num_workers)
        summary = ray_train.fit(config, functools.partial(_train, config, job, run, start, here))
        _describe(run, summary, part)
    return config.run.name, summary, run


def _in_processes(config: TrainConfig, part: ParentJob) -> tuple[str, Summary, RunRef | None] | None:
    """Train with this process as a worker. The first worker also owns the MLflow run."""
    from cvdist.distributed.collectives import gather, raise_on_all_ranks
    from cvdist.runtime import processes
    from cvdist.runtime.signals import SigtermRequest

    with processes.init_distributed(config.runtime) as ranks:
        config = configs.replace(config, name=gather(named(config).run.name)[0])
        started: tuple[RunRef | None, Fence] | None = None
        with raise_on_all_ranks():
            if ranks.rank == 0:
                check_here(config, data_is_here=True)
                started = _start(config, open_all(config, data_is_here=True), tags=part.tags)
        started = gather(started)[0]
        assert started is not None
        run, job = started
        with (
            _told_on_interrupt(config.run.name, part) if ranks.rank == 0 else nullcontext(),
            tracking.end_run_on_exit(run if ranks.rank == 0 else None),
            SigtermRequest(config.checkpoint.grace_period) as sigterm,
        ):
            start = Waterfall()
            summary = _train(config, job, run, start, True, ranks, sigterm.poll)
            if ranks.rank == 0:
                _describe(run, summary, part)
    return (config.run.name, summary, run) if ranks.rank == 0 else None


@contextmanager
def _told_on_interrupt(name: str, part: ParentJob) -> Iterator[None]:
    """On Ctrl-C, say how the run `name` goes on, unless it is a part of a longer job, which says so itself."""
    try:
        yield
    except KeyboardInterrupt:
        if not part.tags:
            logger.warning("stopped: the same command with --name %s goes on from the last checkpoint", name)
        raise


def _train(
    config: TrainConfig,
    job: Fence,
    run: RunRef | None,
    start: Waterfall,
    prepared: bool,
    ranks: RankInfo,
    poll: Callable[[], StopRequest],
) -> Summary:
    """Train in a worker process, whichever runtime has started it.

    Args:
        config: The settings of the run.
        job: The fence of the job.
        run: The MLflow run; None for none.
        start: The phases of the start so far.
        prepared: Whether data and weights are ready on the machine of rank 0.
        ranks: Ranks of this process.
        poll: What this process is asked to do.
    """
    from cvdist.training.setup import build_run
    from cvdist.training.train import train

    with open_worker(config, job, run, ranks, poll) as (worker, tracker):
        if worker.attempt > 1:  # what the job did before is not part of a restart
            start = Waterfall(worker.attempt)
        start.end("workers")
        return train(build_run(config, worker, tracker, start, prepared=prepared))


@contextmanager
def open_worker(
    config: TrainConfig,
    job: Fence,
    run: RunRef | None,
    ranks: RankInfo,
    poll: Callable[[], StopRequest],
    min_interval: float = 0.0,
) -> Iterator[tuple[Worker, Tracker]]:
    """Begin the next attempt of `job`, with the worker and the tracker of this process. All workers call it.

    Args:
        config: The settings of the run.
        job: The fence of the job that this process works for.
        run: The MLflow run to fill; None for none.
        ranks: Ranks of this process.
        poll: What this process is asked to do, see `Worker`.
        min_interval: Seconds between two checkpoints, see `Worker`.

    Raises:
        UserError: If the storage can't be reached; `Superseded` if a newer job has begun.
    """
    from cvdist.checkpoints.store import CheckpointStore
    from cvdist.checkpoints.worker import Worker
    from cvdist.distributed.collectives import raise_on_all_ranks

    fence: Fence | None = None
    with raise_on_all_ranks():
        if ranks.rank == 0:
            fence = job.claim_attempt()
    store = CheckpointStore(job.folder, config.checkpoint.keep, fence)
    worker = Worker(
        ranks,
        store,
        config.checkpoint,
        step_timeout=config.runtime.step_timeout,
        poll=poll,
        min_interval=min_interval,
    )
    attempt = Attempt(fence.number, fence.require_newest) if fence else None
    tracker = open_tracker(run, ranks.rank, ranks.local_rank, ranks.node, attempt)
    try:
        yield worker, tracker
    except UserError:
        worker.finish()  # the checkpoint that is being stored may be the one to resume from
        raise
    finally:
        tracker.close()


def named(config: TrainConfig) -> TrainConfig:
    """Return `config` with a name: its own or, if it has none, a new one."""
    if config.run.name:
        return config
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return configs.replace(config, name=f"{config.recipe or config.model.name}-{stamp}-{secrets.token_hex(2)}")


def absolute(config: TrainConfig) -> TrainConfig:
    """Return `config` with absolute paths, since workers may run in another folder, and known preprocessing.

    Raises:
        UserError: if the preprocessing isn't known.
    """
    if (
        not config.data.image_size or config.data.resize == "weights"
    ):  # imported where it is needed: it takes seconds
        from cvdist import models

        config = models.with_preprocessing(config)
    return configs.replace(
        config,
        data=storage.absolute_if_there(config.data.uri),
        data_root=storage.absolute(config.data.root),
        exclude=storage.absolute(config.data.exclude),
        weights=storage.absolute_if_there(config.model.weights),
        features=storage.absolute(config.features.uri),
    )


def check_here(config: TrainConfig, *, data_is_here: bool) -> bool:
    """Check all that this process can check by itself in seconds, before anything is started.

    Args:
        config: The settings of the run.
        data_is_here: Whether the workers are on this machine, with the data and the weights.

    Returns:
        Whether a picture may have several classes, if the data is here.

    Raises:
        UserError: If the storage, the MLflow store, the data or the weights can't be used.
    """
    from cvdist import loaders, models
    from cvdist.training import memory

    models.preprocessing(config.model)
    root = storage_root(config.run.storage)
    storage.check_writable(root)
    tracking.check_tracking_store(config.tracking, config.run.storage)
    multilabel = data_is_here and loaders.check(config)
    if data_is_here:
        models.prepare(config.model)
    free, needed = storage.free_bytes(root), memory.checkpoint_bytes(config)
    if free is not None and free < needed:
        raise UserError(
            f"--storage {root} has room for {free / 1e6:,.0f} MB, and one checkpoint takes about "
            f"{needed / 1e6:,.0f} MB: make room, or name another folder"
        )
    return multilabel


def open_all(config: TrainConfig, *, data_is_here: bool) -> tracking.TrackingStore | None:
    """Decode the data if the workers are on this machine, and open the MLflow store."""
    from cvdist import loaders
    from cvdist.data.images.listing import without_notes

    if data_is_here and not config.features.uri:
        with without_notes():  # `check_here` has listed the pictures
            loaders.prepare(config)
    return tracking.open_tracking_store(config.tracking, config.run.storage)


def _start(
    config: TrainConfig, store: tracking.TrackingStore | None, *, tags: Mapping[str, str]
) -> tuple[RunRef | None, Fence]:
    """Become the newest job of this name, and open its MLflow run."""
    root, name = storage_root(config.run.storage), config.run.name
    continued = storage.exists(f"{root}/{name}")
    logger.info("run        %s%s, checkpoints in %s/%s", name, " (continued)" if continued else "", root, name)
    job = Fence.claim_job(f"{root}/{name}")
    if store is None:
        return None, job
    run = tracking.start_run(config, store, continued=continued, job=job.name, tags=tags)
    logger.info("tracking   %s", console.mlflow_row(run)[0][1])
    return run, job


def _describe(run: RunRef | None, summary: Summary, part: ParentJob) -> None:
    if run is not None:
        from cvdist.jobs.report import log_report_or_warn
        from cvdist.training import reporting

        description = reporting.description(summary, environment.command())
        tracking.wait_for_server(run)
        tracking.set_description(run, description, _seconds_to_first_step(summary, part))
        log_report_or_warn(run)


def _seconds_to_first_step(summary: Summary, part: ParentJob) -> float:
    return max(summary.first_step_at - part.began, 0.0) if summary.first_step_at else 0.0


def _register(config: TrainConfig, summary: Summary, run: RunRef | None) -> tuple[str, str]:
    """Register the model. Returns the version, and an error's message, which must not cost the finished run."""
    chosen = config.tracking
    if run is None or not chosen.register:
        return "", ""
    from cvdist.tracking import registry

    result = summary.result
    try:
        version = registry.register(
            run,
            registry.best_logged(run),
            chosen.register,
            chosen.alias,
            description=f"{result} at epoch {summary.best.epoch}; {summary.model} on {summary.data}",
            tags={"validation": result, "data": summary.data, "recipe": config.recipe or config.model.name},
        )
    except UserError as error:
        return "", str(error)
    return f"{version} @{chosen.alias}", ""


def exit_code(result: TrainResult) -> int:
    """Return 0.

    Raises:
        UserError: if the model should have been registered and is not.
    """
    if result.not_registered:
        raise UserError(result.not_registered)
    return 0


def table(result: TrainResult) -> str:
    """Format what was trained and where it is, and the next command."""
    summary, run = result.summary, result.run
    rows = [
        ("run", result.name),
        ("data", summary.data),
        ("model", summary.model),
        ("workers", f"{summary.workers} on {summary.hardware}"),
        ("epochs", str(summary.epochs)),
        (summary.heading, summary.outcome),
        ("", summary.by_class),
        *([("", summary.stopped)] if summary.stopped else []),
        *([("logistic", str(summary.logistic))] if summary.logistic else []),
        *([("ridge probe", f"{summary.ridge}, without an epoch")] if summary.ridge else []),
        *([("note", summary.below_baseline)] if summary.below_baseline else []),
        (
            "time",
            f"{log.duration(result.seconds)} in all, first step after "
            f"{result.seconds_to_first_step:.1f} s, {log.duration(summary.train_seconds)} of training",
        ),
        ("speed", f"{summary.samples_per_second:,.0f} samples/s"),
        ("checkpoints", f"{result.storage}/{result.name}"),
    ]
    if summary.slow_requests:
        lost = f"{log.duration(summary.seconds_lost)} lost"
        rows.append(("storage", f"{summary.slow_requests} requests slow, tried again or failed, {lost}"))
    rows += console.mlflow_row(run)
    if result.registered:
        rows.append(("registered", result.registered))
    lines = console.aligned(rows)
    if run is None:
        lines.append("next: the same with MLflow, to see curves, mistakes and the model: --tracking required")
    else:
        lines += [f"next: {console.open_run(run)}", f"all runs: {console.all_runs(run)}"]
    return "\n".join(lines)
