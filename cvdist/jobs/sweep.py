"""A sweep from a configuration to its best model: draw the trials, run them, train the best on."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cvdist import config as configs
from cvdist import log, tracking
from cvdist.checkpoints.fence import Fence
from cvdist.checkpoints.store import StoredCheckpoints
from cvdist.config import ModelConfig, SweepJobConfig, TrainConfig, storage_root
from cvdist.errors import UserError
from cvdist.jobs import train
from cvdist.log import redact
from cvdist.storage import Folder
from cvdist.sweep import space
from cvdist.sweep.record import END_STATES, Trial, TrialStore, best_of, folder_of
from cvdist.sweep.space import Dimension, Settings
from cvdist.tracking import RunRef

logger = logging.getLogger(__name__)

_BYTES_OF_A_PROCESS = 10**9  # with PyTorch and MLflow
# Of the data, what a node may have otherwise without another result.
_OF_THE_NODE = ("cache", "cache_share", "decode_workers", "max_bad_images")


@dataclass(frozen=True)
class Finished:
    """A finished sweep.

    trained: the run of the best trial, trained on; None if that was not asked for. checkpoint: the best
    trial's, empty if it is gone.
    """

    job: SweepJobConfig
    search: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    best: Trial
    checkpoint: str
    trained: train.Finished | None
    run: RunRef | None
    storage: str
    seconds: float


def run(job: SweepJobConfig) -> Finished:
    """Run a sweep, or go on with the one of this name.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
        SystemExit: on SIGTERM, after the MLflow runs were ended as killed; the same command goes on.
    """
    began = time.monotonic()
    configs.check_sweep(job)
    config = train.named(train.absolute(job.train))
    config = configs.replace(config, storage=storage_root(config))  # trials run in other folders
    search = space.parse_search(job.sweep.search, config)
    tries = space.sample_points(search, job.sweep.sweep_seed, job.sweep.trials)
    if len(tries) == 1 < job.sweep.trials:
        raise UserError(
            f"--search has one point alone, {space.format_settings(tries[0])}: name a range, or use "
            "jobs/train.py"
        )
    for settings in tries:
        try:
            space.apply_settings(config, settings)
        except UserError as error:
            raise UserError(f"--search: {space.format_settings(settings)}: {error}") from error
    train.require_ray("try settings one by one with jobs/train.py --runtime inline")
    job = SweepJobConfig(config, job.sweep)
    try:
        with train.sigterm_raises():
            return _run(job, search, tries, began)
    except (KeyboardInterrupt, SystemExit):
        logger.warning("the sweep was stopped: the same command with --name %s goes on", config.checkpoint.name)
        raise


def _run(job: SweepJobConfig, search: tuple[Dimension, ...], tries: list[Settings], began: float) -> Finished:
    config, sweep = job.train, job.sweep
    name, root = config.checkpoint.name, storage_root(config)
    with ThreadPoolExecutor(max_workers=1) as pool:
        opening = pool.submit(_open, config, tries)
        from cvdist.runtime import ray_cluster

        nodes = ray_cluster.connect(config)
        store = opening.result()
    use_gpu = ray_cluster.require_resources(config)
    from cvdist.jobs import trials as running

    uri = f"{root}/{name}"
    folder = Folder.open(uri, "--storage", patient=True)
    records = TrialStore(folder)
    continued = records.begin(_plan(config, search, sweep.sweep_seed, sweep.trial_epochs))
    fence = Fence.claim_job(uri, attempt=0)
    known = records.read(tries)
    left = [trial for trial in known if trial.state not in END_STATES]
    _announce(job, search, known, left, continued=continued)
    parent, runs = None, {}
    if store is not None:
        from cvdist.jobs import sweep_run

        parent = sweep_run.start(job, search, store, continued=continued, owner=fence.name)
        logger.info("tracking   %s, %s", redact(parent.tracking_uri), parent.page)
    with tracking.end_run_on_exit(parent):
        if parent is not None:
            parent.require_reachable_from(nodes)
        base = _of_a_trial(config)
        try:
            if parent is not None:
                runs = sweep_run.start_trials(base, left, parent, uri, continued=continued)
            keeper = _Keeper(folder, runs, known)
            epochs = sweep.trial_epochs or config.loop.epochs
            task = running.Task(
                config=base,
                folder=uri,
                epochs=epochs,
                trials_on_node=_trials_on_node(job),
                use_gpu=use_gpu,
                memory=_memory(config, tries),
                settings={trial.number: trial.settings for trial in left},
                runs=runs,
            )
            watch = running.Watch(known, runs, records.write, keeper.ended, fence)
            if left:
                running.run(sweep, task, watch, [trial.number for trial in left])
        finally:
            if parent is not None:
                tracking.end_children(parent.tracking_uri, parent.run_id, "KILLED", parent.job)
        done = [watch.trials[trial.number] for trial in known]
        if parent is not None:
            sweep_run.log_results(parent, search, done, sweep.grace_epochs)
        best = best_of(done)
        if best is None:
            reasons = [f"trial {trial.number}: {trial.reason}" for trial in done if trial.reason]
            raise UserError(f"no trial of {len(done)} has reached its end ({'; '.join(reasons[:1])})")
        keeper.keep_only(best)
        checkpoint = keeper.checkpoint(best)
        trained = _train_best(job, best, checkpoint, parent) if sweep.train_best else None
    return Finished(job, search, tuple(done), best, checkpoint, trained, parent, root, time.monotonic() - began)


class _Keeper:
    """Ends the trials' runs, and keeps the checkpoints of none but the best: a large head's take gigabytes."""

    def __init__(self, folder: Folder, runs: dict[int, RunRef], known: list[Trial]) -> None:
        self._folder, self._runs = folder, runs
        self._ended = [trial for trial in known if trial.state in END_STATES]
        self._cleared: set[int] = set()

    def ended(self, trial: Trial) -> None:
        """A trial is over. It may still be storing a checkpoint; those that ended before it have done so."""
        if trial.number in self._runs:
            from cvdist.jobs import sweep_run

            sweep_run.end_trial(self._runs[trial.number], trial)
        before, self._ended = self._ended, [*self._ended, trial]
        best = best_of(self._ended)
        self._clear(one for one in before if one != best)

    def keep_only(self, best: Trial) -> None:
        """Delete the checkpoints of all others that have ended."""
        self._cleared.clear()
        self._clear(trial for trial in self._ended if trial.number != best.number)

    def checkpoint(self, trial: Trial) -> str:
        """The trial's best one; empty if it is gone."""
        kept = self._of(trial)
        name = kept.best()
        return kept.uri(name) if name is not None else ""

    def _clear(self, trials: Any) -> None:
        for trial in trials:
            if trial.number not in self._cleared:
                self._cleared.add(trial.number)
                try:
                    self._of(trial).delete_all()
                except UserError as error:
                    logger.warning("checkpoints of trial %d stay: %s", trial.number, error)

    def _of(self, trial: Trial) -> StoredCheckpoints:
        inner, folder = folder_of(trial.number), self._folder
        return StoredCheckpoints(
            Folder(f"{folder.uri}/{inner}", folder.filesystem, f"{folder.root}/{inner}", folder.flag)
        )


def _open(config: TrainConfig, tries: list[Settings]) -> tracking.TrackingStore | None:
    """Reach all that results are written to, and the data if the workers are on this machine."""
    here = "RAY_ADDRESS" not in os.environ
    store = train.open_all(config, data_is_here=here)
    if here and config.features.features:
        from cvdist import loaders

        for views in {settings["views"] for settings in tries if "views" in settings}:
            loaders.prepare(configs.replace(config, views=views))
    return store


def _plan(config: TrainConfig, search: tuple[Dimension, ...], seed: int, epochs: int) -> dict[str, Any]:
    """What has to be the same when a sweep goes on, by the flags' names."""
    searched = {dimension.name for dimension in search}
    plan: dict[str, Any] = {
        "--search": [str(dimension) for dimension in search],
        "--sweep-seed": seed,
        "--trial-epochs": epochs,
        "--features": redact(config.features.features),
    }
    for group in (config.data, config.model, config.optimizer, config.loop):
        for name, value in dataclasses.asdict(group).items():
            if name not in _OF_THE_NODE and name not in searched:
                plan["--" + name.replace("_", "-")] = redact(value) if isinstance(value, str) else value
    return plan


def _of_a_trial(config: TrainConfig) -> TrainConfig:
    """Without what is for the best run alone, or the same for all trials."""
    return configs.replace(
        config, register="", log_model=False, system_metrics=False, visualize=False, ridge_probe=False
    )


def _trials_on_node(job: SweepJobConfig) -> int:
    """How many trials may run on one node, at most."""
    import ray

    cores = job.train.runtime.cpus_per_worker
    fit = max(
        (int(node["Resources"].get("CPU", 0) // cores) for node in ray.nodes() if node["Alive"]), default=1
    )
    return max(1, min(fit, job.sweep.concurrent_trials or fit))


def _memory(config: TrainConfig, tries: list[Settings]) -> int:
    """Bytes that the largest trial needs, about; where no node has as many, all of a node's.

    Weights, their gradients and the optimiser's state, and the copy of them that is being stored.
    """
    import ray

    from cvdist.jobs.preflight import _trained_parameters

    most = 0
    sizes: dict[ModelConfig, int] = {}
    for settings in tries:
        chosen = space.apply_settings(config, settings)
        model = dataclasses.replace(chosen.model, dropout=0.0)
        if model not in sizes:
            sizes[model] = _trained_parameters(chosen)
        state = 2 if chosen.optimizer.optimizer == "adamw" else int(chosen.optimizer.momentum > 0)
        copies = 2 * (1 + state + int(chosen.optimizer.model_ema_decay > 0)) + 1
        most = max(most, _BYTES_OF_A_PROCESS + 4 * copies * sizes[model])
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    return min(most, max(nodes, default=0))


def _announce(
    job: SweepJobConfig,
    search: tuple[Dimension, ...],
    known: list[Trial],
    left: list[Trial],
    *,
    continued: bool,
) -> None:
    config, sweep = job.train, job.sweep
    name = config.checkpoint.name
    logger.info(
        "sweep      %s%s, in %s/%s", name, " (continued)" if continued else "", storage_root(config), name
    )
    logger.info("search     %s", "  ".join(map(str, search)))
    epochs = sweep.trial_epochs or config.loop.epochs
    stops = f", weak ones less (ASHA, from epoch {sweep.grace_epochs})" if sweep.early_stopping else ""
    logger.info("trials     %d of up to %d epochs%s", len(known), epochs, stops)
    if len(known) < sweep.trials:
        logger.info("           the search has no more different settings than these")
    if ended := len(known) - len(left):
        logger.info("resuming   %d trials have ended and are kept, %d are left", ended, len(left))
    for trial in left:
        logger.info("           trial %-3d %s", trial.number, space.format_settings(trial.settings))


def _train_best(
    job: SweepJobConfig, best: Trial, checkpoint: str, parent: RunRef | None
) -> train.Finished | None:
    """An ordinary training with the best trial's settings, from its best checkpoint on."""
    config = space.apply_settings(job.train, best.settings)
    assert best.best is not None
    logger.info(
        "best       trial %d, %s, %s: training it on",
        best.number,
        log.percent(best.best.correct, best.best.total),
        space.format_settings(best.settings),
    )
    if not checkpoint:
        logger.warning("its checkpoint is gone: it is trained from the start")
    config = configs.replace(config, name=f"{config.checkpoint.name}-best-{best.number:02}", resume=checkpoint)
    tags = {tracking.PARENT_TAG: parent.run_id} if parent is not None else {}
    return train.launch(config, train.Part(tags, time.time()))
