"""Run a sweep from its settings to its best model: draw the trials, run them, train the best one further."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from cvdist import config as configs
from cvdist import log, tracking
from cvdist.checkpoints.fence import Fence
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import ModelConfig, SweepJobConfig, TrainConfig, storage_root
from cvdist.errors import UserError
from cvdist.jobs import cli, console
from cvdist.jobs.train import ParentJob, TrainResult, absolute, check_here, named, open_all, train
from cvdist.jobs.train import exit_code as train_exit_code
from cvdist.log import redact
from cvdist.runtime.environment import require_ray
from cvdist.runtime.signals import sigterm_raises
from cvdist.storage import Folder
from cvdist.sweep import importance, space
from cvdist.sweep.record import END_STATES, ONE_CLASS_NEEDED, Trial, TrialState, TrialStore, best_of, folder_of
from cvdist.sweep.space import Dimension, Settings
from cvdist.tracking import RunRef, environment, open_tracker, sweep_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_SHOWN = 30  # trials in the description
_FIGURES = {
    "parallel_coordinates": "which settings lead where",
    "importance": "which of them matter",
    "trials": "accuracy by epoch, and where trials were stopped",
}
_BYTES_OF_A_PROCESS = 10**9  # with PyTorch and MLflow


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Args:
        job: its settings.
        search: what was searched.
        trials: all trials, in the order of their numbers.
        best: the best trial.
        checkpoint: URI of the best trial's best checkpoint; empty if it is gone.
        trained: the run of the best trial, trained on; None if that was not asked for.
        run: the sweep's MLflow run; None without one.
        storage: folder or URI of the runs.
        seconds: from start to end.
    """

    job: SweepJobConfig
    search: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    best: Trial
    checkpoint: str
    trained: TrainResult | None
    run: RunRef | None
    storage: str
    seconds: float


def sweep(job: SweepJobConfig) -> SweepResult:
    """Run a sweep, or go on with the one of this name.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM, after the MLflow runs were ended as killed; the same command goes on.
    """
    began = time.monotonic()
    configs.check_sweep(job)
    config = named(absolute(job.train))
    # Trials run in other folders.
    config = configs.replace(config, storage=storage_root(config.run.storage), runtime="ray")
    search = space.parse_search(job.sweep.search, config)
    tries = space.sample_points(search, job.sweep.seed, job.sweep.trials)
    if len(tries) == 1 < job.sweep.trials:
        raise UserError(
            f"--search has one point alone, {space.format_settings(tries[0])}: name a range, or use "
            "jobs/train.py"
        )
    for settings in tries:
        space.require_fit(config, settings, f"--search: {space.format_settings(settings)}")
    require_ray("try settings one by one with jobs/train.py --runtime inline")
    job = SweepJobConfig.of(config, job.sweep)
    try:
        with sigterm_raises():
            return _run(job, search, tries, began)
    except (KeyboardInterrupt, SystemExit):
        logger.warning("the sweep was stopped: the same command with --name %s goes on", config.run.name)
        raise


def _run(
    job: SweepJobConfig, search: tuple[Dimension, ...], tries: list[Settings], began: float
) -> SweepResult:
    from cvdist.runtime import ray_cluster
    from cvdist.runtime.ray_cluster import ResourceRequest

    config, settings = job.train, job.sweep
    name, root = config.run.name, storage_root(config.run.storage)
    here = not ray_cluster.address()
    _check_here(config, tries, data_is_here=here)
    with ThreadPoolExecutor(max_workers=1) as pool:
        opening = pool.submit(open_all, config, data_is_here=here)
        request = ResourceRequest.of_workers(config.runtime)
        nodes = ray_cluster.connect(request)
        store = opening.result()
    use_gpu = ray_cluster.require_resources(request)
    from cvdist.jobs import trials as running

    uri = f"{root}/{name}"
    folder = Folder.open(uri, "--storage", patient=True)
    records = TrialStore(folder)
    continued = records.begin(_plan(config, search, settings.seed, settings.trial_epochs))
    fence = Fence.claim_job(uri)
    known = records.read(tries)
    left = [trial for trial in known if trial.state not in END_STATES]
    _announce(job, search, known, left, continued=continued)
    parent, runs = None, {}
    if store is not None:
        parent = sweep_runs.start_sweep(job, search, store, continued=continued, owner=fence.name)
        logger.info("tracking   %s, %s", redact(parent.tracking_uri), parent.page())
    with tracking.end_run_on_exit(parent):
        if parent is not None:
            parent.require_reachable_from(nodes)
        base = _of_a_trial(config)
        try:
            if parent is not None:
                runs = sweep_runs.start_trials(base, left, parent, uri, continued=continued)
            keeper = _Keeper(folder, runs, known)
            epochs = settings.trial_epochs or config.loop.epochs
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
                running.run(settings, task, watch, [trial.number for trial in left])
        finally:
            if parent is not None:
                tracking.end_children(parent.tracking_uri, parent.run_id, "KILLED", parent.job)
        done = [watch.trials[trial.number] for trial in known]
        if parent is not None:
            _log_results(parent, search, done, settings.grace_epochs)
        best = best_of(done)
        if best is None:
            reasons = [f"trial {trial.number}: {trial.reason}" for trial in done if trial.reason]
            raise UserError(f"no trial of {len(done)} has reached its end ({'; '.join(reasons[:1])})")
        keeper.keep_only(best)
        checkpoint = keeper.checkpoint(best)
        trained = _train_best(job, best, checkpoint, parent) if settings.train_best else None
    return SweepResult(
        job, search, tuple(done), best, checkpoint, trained, parent, root, time.monotonic() - began
    )


class _Keeper:
    """Ends the trials' runs, and keeps only the best trial's checkpoints: a large head's take gigabytes."""

    def __init__(self, folder: Folder, runs: dict[int, RunRef], known: list[Trial]) -> None:
        self._folder, self._runs = folder, runs
        self._ended = [trial for trial in known if trial.state in END_STATES]
        self._cleared: set[int] = set()

    def ended(self, trial: Trial) -> None:
        """End the run of a trial that is over, and delete the checkpoints of earlier ones, except the best.

        The trial itself may still be storing a checkpoint; the earlier ones have stored theirs.
        """
        if trial.number in self._runs:
            sweep_runs.end_trial(self._runs[trial.number], trial)
        before, self._ended = self._ended, [*self._ended, trial]
        best = best_of(self._ended)
        self._clear(one for one in before if one != best)

    def keep_only(self, best: Trial) -> None:
        """Delete the checkpoints of all others that have ended."""
        self._cleared.clear()
        self._clear(trial for trial in self._ended if trial.number != best.number)

    def checkpoint(self, trial: Trial) -> str:
        """Return the URI of the trial's best checkpoint; empty if it is gone."""
        kept = self._of(trial)
        best = kept.best()
        return kept.uri(best.name) if best is not None else ""

    def _clear(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            if trial.number not in self._cleared:
                self._cleared.add(trial.number)
                try:
                    self._of(trial).delete_all()
                except UserError as error:
                    logger.warning("checkpoints of trial %d stay: %s", trial.number, error)

    def _of(self, trial: Trial) -> CheckpointStore:
        inner, folder = folder_of(trial.number), self._folder
        return CheckpointStore(
            Folder(f"{folder.uri}/{inner}", folder.filesystem, f"{folder.root}/{inner}", folder.flag)
        )


def _check_here(config: TrainConfig, tries: list[Settings], *, data_is_here: bool) -> None:
    """Check like `check_here`, for all numbers of views to try, and refuse several classes per picture."""
    if check_here(config, data_is_here=data_is_here):
        raise UserError(ONE_CLASS_NEEDED)
    if data_is_here and config.features.uri:
        from cvdist import loaders

        for views in {settings["views"] for settings in tries if "views" in settings}:
            loaders.check(configs.replace(config, views=views))


def _plan(config: TrainConfig, search: tuple[Dimension, ...], seed: int, epochs: int) -> dict[str, Any]:
    """Return the values that must be the same when a sweep is continued, by the flags' names."""
    searched = {configs.dashed(dimension.name) for dimension in search}
    return {
        **{flag: value for flag, value in configs.learning_settings(config).items() if flag not in searched},
        "--search": [str(dimension) for dimension in search],
        "--sweep-seed": seed,
        "--trial-epochs": epochs,
    }


def _of_a_trial(config: TrainConfig) -> TrainConfig:
    """Return `config` without what only the best run makes, or what would be the same for all trials."""
    return configs.replace(
        config, register="", log_model=False, system_metrics=False, visualize=False, ridge_probe=False
    )


def _trials_on_node(job: SweepJobConfig) -> int:
    """Return how many trials may run on one node at most."""
    import ray

    cores = job.train.runtime.cpus_per_worker
    fit = max(
        (int(node["Resources"].get("CPU", 0) // cores) for node in ray.nodes() if node["Alive"]), default=1
    )
    return max(1, min(fit, job.sweep.concurrent_trials or fit))


def _memory(config: TrainConfig, tries: list[Settings]) -> int:
    """Estimate the bytes that the largest trial needs; if no node has as many, return all that a node has.

    Counts the weights, their gradients, the optimizer's state, and the copy of these that is being stored.
    """
    import ray

    from cvdist.training.memory import trained_parameters

    most = 0
    sizes: dict[ModelConfig, int] = {}
    for settings in tries:
        chosen = space.apply_settings(config, settings)
        model = dataclasses.replace(chosen.model, dropout=0.0)
        if model not in sizes:
            sizes[model] = trained_parameters(chosen)
        state = 2 if chosen.optimizer.name == "adamw" else int(chosen.optimizer.momentum > 0)
        copies = 2 * (1 + state + int(chosen.loop.model_ema_decay > 0)) + 1
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
    config, settings = job.train, job.sweep
    name = config.run.name
    logger.info(
        "sweep      %s%s, in %s/%s",
        name,
        " (continued)" if continued else "",
        storage_root(config.run.storage),
        name,
    )
    logger.info("search     %s", "  ".join(map(str, search)))
    epochs = settings.trial_epochs or config.loop.epochs
    stops = f", weak ones less (ASHA, from epoch {settings.grace_epochs})" if settings.early_stopping else ""
    logger.info("trials     %d of up to %d epochs%s", len(known), epochs, stops)
    if len(known) < settings.trials:
        logger.info("           the search has no more different settings than these")
    if ended := len(known) - len(left):
        logger.info("resuming   %d trials have ended and are kept, %d are left", ended, len(left))
    for trial in left:
        logger.info("           trial %-3d %s", trial.number, space.format_settings(trial.settings))


def _train_best(job: SweepJobConfig, best: Trial, checkpoint: str, parent: RunRef | None) -> TrainResult | None:
    """Run an ordinary training with the best trial's settings, from its best checkpoint on."""
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
    config = configs.replace(config, name=f"{config.run.name}-best-{best.number:02}", resume=checkpoint)
    tags = {tracking.PARENT_TAG: parent.run_id} if parent is not None else {}
    return train(config, ParentJob(tags, time.time()))


# ------------------------------------------------------------------------------------------ the page in MLflow


def _log_results(ref: RunRef, search: Sequence[Dimension], trials: Sequence[Trial], grace: int) -> None:
    """Log table, figures, numbers and description; `grace`: epochs that every trial was trained for."""
    tracker = open_tracker(ref, 0, 0, "")
    best = best_of(trials)
    states = Counter(trial.state for trial in trials)
    numbers: dict[str, float] = {
        "trials/finished": states["finished"],
        "trials/stopped": states["stopped"],
        "trials/lost": states["diverged"] + states["failed"],
        "trials/epochs": sum(len(trial.epochs) for trial in trials),
    }
    if best is not None and best.best is not None:
        numbers |= {
            "best/correct": best.best.correct,
            "best/total": best.best.total,
            "best/accuracy": best.best.correct / best.best.total,
            "best/trial": best.number,
        }
    tracker.log_metrics(numbers, step=0)
    tracker.log_text("trials.csv", trials_csv(search, trials))
    drawn = _figures(search, trials, grace)
    for name, draw in drawn.items():
        tracker.log_figure(name, draw)
    tracker.close()
    tracking.set_description(ref, description(search, trials, environment.command(), set(drawn)))


def _figures(
    search: Sequence[Dimension], trials: Sequence[Trial], grace: int
) -> Mapping[str, Callable[[], Figure]]:
    """Return the function that draws each figure, by the figure's name."""
    from cvdist.figures import sweep as figures

    drawn = {
        "parallel_coordinates": partial(figures.parallel_coordinates, search, trials),
        "trials": partial(figures.trial_curves, trials),
    }
    shares = importance.permutation_importance(search, trials, grace)
    return drawn if shares is None else {**drawn, "importance": partial(figures.importance_bars, shares)}


def _values(search: Sequence[Dimension], trial: Trial) -> list[str]:
    """Return the trial's value of each searched setting; empty where it does not have the setting."""
    known = {name: space.format_value(value) for name, value in trial.settings.items()}
    return [known.get(dimension.name, "") for dimension in search]


def trials_csv(search: Sequence[Dimension], trials: Sequence[Trial]) -> str:
    """Format all trials as CSV, in the order of their numbers."""
    output = io.StringIO()
    writer = csv.writer(output)
    names = [dimension.name for dimension in search]
    results = ["correct", "total", "accuracy", "valid_loss", "best_epoch", "epochs", "seconds", "reason"]
    writer.writerow(["trial", "state", *names, *results])
    for trial in trials:
        best = trial.best
        measured = ["", "", "", "", ""]
        if best is not None:
            accuracy = f"{best.correct / best.total:.6f}"
            measured = [str(best.correct), str(best.total), accuracy, f"{best.loss:.6f}", str(best.epoch)]
        ends = [len(trial.epochs), f"{trial.seconds:.1f}", log.redact(trial.reason)]
        writer.writerow([trial.number, trial.state, *_values(search, trial), *measured, *ends])
    return output.getvalue()


def description(
    search: Sequence[Dimension], trials: Sequence[Trial], command: str, drawn: Container[str]
) -> str:
    """Return Markdown for the top of the run's page. `drawn`: names of the figures."""
    shown = "\n".join(f"- `figures/{name}.png`: {what}" for name, what in _FIGURES.items() if name in drawn)
    best = best_of(trials)
    title = "no trial has finished"
    if best is not None and best.best is not None:
        title = f"{log.percent(best.best.correct, best.best.total)} by trial {best.number}"
    header = ["trial", *(dimension.flag for dimension in search), "accuracy", "epochs", "state"]
    rows = [header, ["---"] * len(header)]
    ranked = sorted(trials, key=lambda trial: (trial is not best, -trial.score, trial.number))
    for trial in ranked[:_SHOWN]:
        result = log.percent(trial.best.correct, trial.best.total) if trial.best is not None else ""
        rows.append([str(trial.number), *_values(search, trial), result, str(len(trial.epochs)), trial.state])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    more = f"\n\nand {len(trials) - _SHOWN} more in `trials.csv`" if len(trials) > _SHOWN else ""
    return f"""### {title}

`{command}`

{lines}{more}

Artifacts:
- `trials.csv`: all trials, with their settings and exact counts
{shown}

Each trial is a run below this one; the best, trained on, has figures, a report and a model.
"""


# ------------------------------------------------------------------------------------------------- printing


def exit_code(result: SweepResult) -> int:
    """Return the exit code of the best trial's training, or 0 if it was not trained further."""
    return train_exit_code(result.trained) if result.trained is not None else 0


def table(result: SweepResult) -> str:
    """Format what was tried, the results, and the next command."""
    best, job, trained = result.best, result.job, result.trained
    name = job.run.name
    count = Counter(trial.state for trial in result.trials)
    ends = ", ".join(f"{count[state]} {state}" for state in get_args(TrialState) if count[state])
    epochs = sum(len(trial.epochs) for trial in result.trials)
    whole = len(result.trials) * (job.sweep.trial_epochs or job.loop.epochs)
    assert best.best is not None
    rows = [
        ("sweep", name),
        ("trials", f"{len(result.trials)}: {ends}; {epochs} of {whole} epochs trained"),
        ("best", f"trial {best.number}: {space.format_settings(best.settings)}"),
        ("", f"{log.percent(best.best.correct, best.best.total)} at epoch {best.best.epoch}"),
    ]
    if trained is not None:
        summary = trained.summary
        reached = log.percent(summary.best.valid_correct, summary.best.valid_total)
        rows.append(("trained on", f"{trained.name}: {reached} at epoch {summary.best.epoch}"))
    rows.append(("time", f"{log.duration(result.seconds)} in all"))
    if trained is not None:
        rows.append(("checkpoints", f"{trained.storage}/{trained.name}"))
    elif result.checkpoint:
        rows.append(("checkpoint", result.checkpoint))
    rows += console.mlflow_row(result.run)
    if trained is not None and trained.registered:
        rows.append(("registered", trained.registered))
    lines = console.aligned(rows)
    if trained is None:
        resume = f" --resume {result.checkpoint}" if result.checkpoint else ""
        lines.append(
            f"next: the sweep's command without --no-train-best, or one training: "
            f"{cli.command('train')} {job.recipe} {space.format_flags(best.settings)}{resume} and the sweep's "
            "other flags"
        )
        return "\n".join(lines)
    evaluate = cli.command("evaluate")
    if result.run is None:
        lines.append(f"next: {evaluate} {trained.storage}/{trained.name}")
    else:
        lines.append(f"next: {console.open_run(result.run)}, and {evaluate} {trained.name}")
    return "\n".join(lines)
