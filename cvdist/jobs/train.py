"""From a configuration to a finished run: choose the runtime, open the MLflow run, train, end the run."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from cvdist import config as configs
from cvdist import storage, tracking
from cvdist.checkpoints.fence import Fence
from cvdist.config import TrainConfig, storage_root
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.runtime.signals import Stop
from cvdist.tracking import Attempt, RunRef, environment, open_tracker

if TYPE_CHECKING:
    from cvdist.features.build import Built
    from cvdist.results import Summary

logger = logging.getLogger(__name__)

# When this process began: importing torch is a part of what its user waits for. Seconds since 1970, and by the
# clock that nobody sets.
_BEGAN_AT = float(psutil.Process().create_time())
_BEGAN = time.monotonic() - (time.time() - _BEGAN_AT)


@dataclass(frozen=True)
class Finished:
    """A finished run: what the loop says of it, where it is, and seconds from start to end.

    registered: the version in MLflow's registry and its alias, if asked for; not_registered: why there is none.
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
class Preprocessed:
    """A finished extraction, and seconds from start to end."""

    config: TrainConfig
    built: Built
    seconds: float


@dataclass(frozen=True)
class Part:
    """A training as a part of a longer job. tags: for its MLflow run; began: seconds since 1970."""

    tags: Mapping[str, str]
    began: float


def launch(config: TrainConfig, part: Part | None = None) -> Finished | None:
    """Run a training job. Under torchrun, None on all workers but the first.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
        SystemExit: on SIGTERM, after the MLflow run was ended as killed.
    """
    configs.check(config)
    config = absolute(config)
    runtime = config.runtime.runtime
    if runtime == "auto":
        # What torchrun, or anything else that starts workers, tells each of them.
        runtime = "torchrun" if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else "ray"
    began = time.monotonic() - (time.time() - part.began) if part else _BEGAN
    part = part or Part({}, _BEGAN_AT)
    with sigterm_raises():
        finished = _on_ray(config, part) if runtime == "ray" else _in_processes(config, part)
    if finished is None:
        return None
    name, summary, run = finished
    registered, not_registered = _register(config, summary, run)
    seconds, first_step = time.monotonic() - began, _seconds_to_first_step(summary, part)
    return Finished(name, summary, run, storage_root(config), seconds, first_step, registered, not_registered)


def preprocess(config: TrainConfig) -> Preprocessed:
    """Run an extraction: make or update the cache at `--features`.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
        SystemExit: on SIGTERM; what is finished is kept.
    """
    configs.check(config)
    if not config.data.data:
        raise UserError("--data is needed: the folder or URI of the pictures")
    config = absolute(config)
    require_ray("train from the pictures themselves, without --features")
    from cvdist.jobs import preprocess

    began = time.monotonic()
    with sigterm_raises():
        built = preprocess.extract(config)
    return Preprocessed(config, built, time.monotonic() - began)


def require_ray(otherwise: str) -> None:
    """Refuse to go on without Ray; `otherwise`: what can be done instead.

    Raises:
        UserError: if it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"Ray is not installed: pip install 'ray[default,train,data]', or, without it, {otherwise}"
        )


def _on_ray(config: TrainConfig, part: Part) -> tuple[str, Summary, RunRef | None]:
    """This process is the driver: it owns the MLflow run, the workers fill it."""
    require_ray("start with torchrun --nproc-per-node N jobs/train.py ... or use --runtime inline")
    from cvdist.runtime import ray_cluster

    config = named(config)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Ray's processes take seconds to start, and so do PyTorch and MLflow to import: side by side.
        opening = pool.submit(open_all, config, data_is_here="RAY_ADDRESS" not in os.environ)
        nodes = ray_cluster.connect(config)
        store = opening.result()
    from cvdist.runtime import ray_train

    run, fence = _start(config, store, attempt=0, tags=part.tags)
    with tracking.end_run_on_exit(run):
        if run is not None:
            run.require_reachable_from(nodes)
        summary = ray_train.fit(config, run, fence)
        _describe(run, summary, part)
    return config.checkpoint.name, summary, run


def _in_processes(config: TrainConfig, part: Part) -> tuple[str, Summary, RunRef | None] | None:
    """This process is a worker; the first one owns the MLflow run as well."""
    from cvdist.distributed.collectives import gather, raise_on_all_ranks
    from cvdist.runtime import processes
    from cvdist.training.train import TrainingLoop

    with processes.init_distributed(config) as place:
        config = configs.replace(config, name=gather(named(config).checkpoint.name)[0])
        run: RunRef | None = None
        fence: Fence | None = None
        with raise_on_all_ranks():
            processes.require_folder(config)
            if place.rank == 0:
                run, fence = _start(config, open_all(config, data_is_here=True), attempt=1, tags=part.tags)
        run = gather(run)[0]
        with (
            tracking.end_run_on_exit(run if place.rank == 0 else None),
            Stop(config.checkpoint.grace_period) as stop,
        ):
            worker = place.worker(config, fence, stop.asked)
            attempt = Attempt(fence.number, fence.require_newest) if fence else None
            tracker = open_tracker(run, worker.rank, worker.local_rank, worker.node, attempt)
            try:
                summary = TrainingLoop(config, worker, tracker).run()
            except UserError:
                worker.finish()  # what is on its way may be what the user goes on from
                raise
            finally:
                tracker.close()
            if worker.rank == 0:
                _describe(run, summary, part)
    return (config.checkpoint.name, summary, run) if worker.rank == 0 else None


def named(config: TrainConfig) -> TrainConfig:
    """With a name of its own, where none is given."""
    if config.checkpoint.name:
        return config
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return configs.replace(config, name=f"{config.recipe or config.model.model}-{stamp}-{secrets.token_hex(2)}")


def absolute(config: TrainConfig) -> TrainConfig:
    """Workers may run in another folder than the one that relative paths were meant for."""
    changes = {
        "data": config.data.data,
        "weights": config.model.weights,
        "features": config.features.features,
    }
    paths = {name: Path(value).expanduser() for name, value in changes.items() if value and "://" not in value}
    there = {name: path for name, path in paths.items() if path.exists() or name == "features"}
    return configs.replace(config, **{name: str(path.absolute()) for name, path in there.items()})


def open_all(config: TrainConfig, *, data_is_here: bool) -> tracking.TrackingStore | None:
    """Reach all that results are written to, and the data if the workers are on this machine."""
    from cvdist import loaders, models

    models.preprocessing(config.model)
    storage.check_writable(storage_root(config))
    if data_is_here:
        models.prepare(config.model)
        loaders.prepare(config)
    return tracking.open_tracking_store(config)


def _start(
    config: TrainConfig, store: tracking.TrackingStore | None, *, attempt: int, tags: Mapping[str, str]
) -> tuple[RunRef | None, Fence]:
    """Become the newest job of this name, and open its MLflow run."""
    root, name = storage_root(config), config.checkpoint.name
    continued = storage.exists(f"{root}/{name}")
    logger.info("run        %s%s, checkpoints in %s/%s", name, " (continued)" if continued else "", root, name)
    fence = Fence.claim_job(f"{root}/{name}", attempt=attempt)
    if store is None:
        return None, fence
    run = tracking.start_run(config, store, continued=continued, job=fence.name, tags=tags)
    logger.info("tracking   %s, %s", redact(run.tracking_uri), run.page)
    return run, fence


def _describe(run: RunRef | None, summary: Summary, part: Part) -> None:
    if run is not None:
        from cvdist.jobs import report
        from cvdist.training import reporting

        description = reporting.description(summary, environment.command())
        tracking.wait_for_server(run)
        tracking.set_description(run, description, _seconds_to_first_step(summary, part))
        report.log_report_or_warn(run)


def _seconds_to_first_step(summary: Summary, part: Part) -> float:
    return max(summary.first_step_at - part.began, 0.0) if summary.first_step_at else 0.0


def _register(config: TrainConfig, summary: Summary, run: RunRef | None) -> tuple[str, str]:
    """The version in the registry; or why there is none, which must not cost the finished run."""
    chosen = config.tracking
    if run is None or not chosen.register:
        return "", ""
    from cvdist.log import percent
    from cvdist.tracking import registry

    result = percent(summary.best_correct, summary.valid_total)
    try:
        version = registry.register(
            run,
            registry.best_logged(run),
            chosen.register,
            chosen.alias,
            description=f"{result} at epoch {summary.best_epoch}; {summary.model} on {summary.data}",
            tags={"validation": result, "data": summary.data, "recipe": config.recipe or config.model.model},
        )
    except UserError as error:
        return "", str(error)
    return f"{version} @{chosen.alias}", ""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Kubernetes, `ray job stop` and torchrun stop a job by SIGTERM: let `finally` clauses run."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
