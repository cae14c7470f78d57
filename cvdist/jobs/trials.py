"""Trials by Ray Tune: each is a training loop in another process, and hears after each epoch whether to go on.

Ray Tune decides what runs where, and its ASHA what is stopped. It keeps no state that matters: checkpoints and
results lie in the run's own storage (`cvdist.checkpoints.store`, `cvdist.sweep.record`).
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import queue
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from cvdist import config as configs
from cvdist import log
from cvdist.checkpoints.fence import Fence, FenceWatch
from cvdist.config import SweepConfig, TrainConfig
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import Superseded, UserError, superseded_by_another_job
from cvdist.jobs.train import open_worker
from cvdist.sweep import space
from cvdist.sweep.record import ONE_CLASS_NEEDED, Trial, TrialEpoch, folder_of
from cvdist.tracking import NoTracker, RunRef, Tracker
from cvdist.tracking.sweep_runs import show_running
from cvdist.training.finite import NotFinite
from cvdist.training.setup import build_run
from cvdist.training.train import train

logger = logging.getLogger(__name__)

_STORE_SECONDS = 30.0  # least time after a checkpoint before the next, unless that is the best so far
_END_SECONDS = 120.0  # time for the last results to reach MLflow, and for a checkpoint to reach the storage
_SHOWN = 80  # letters of a reason
_SCORE, _EPOCH = "score", "epoch"


class _Stopped(BaseException):
    """Ends a trial that is not to go on. It is no `Exception`, so that no handler of errors catches it."""


# --------------------------------------------------------------------------------------------------- a trial


class TrialTracker(NoTracker):
    """Passes on a trial's parameters and metrics, but no figures and files, and reports each epoch."""

    def __init__(self, inner: Tracker, epoch_done: Callable[[TrialEpoch], None]) -> None:
        """Wrap the tracker of the trial's run.

        Args:
            inner: the tracker of the trial's run.
            epoch_done: is called with the results of each epoch.
        """
        self._inner, self._epoch_done = inner, epoch_done
        self.log_params, self.log_dataset, self.close = inner.log_params, inner.log_dataset, inner.close  # type: ignore[method-assign]

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics, and report the epoch if they are the metrics of an epoch.

        They come after the epoch's checkpoint. A resumed trial begins with the epochs before.
        """
        self._inner.log_metrics(values, step)
        if "valid/correct" in values:
            self._epoch_done(
                TrialEpoch(step, int(values["valid/correct"]), int(values["valid/total"]), values["valid/loss"])
            )


@dataclass(frozen=True)
class Task:
    """What a process needs for its trials. folder: the sweep's; memory: bytes; settings, runs: by trial."""

    config: TrainConfig
    folder: str
    epochs: int
    trials_on_node: int
    use_gpu: bool
    memory: int
    settings: dict[int, space.Settings]
    runs: dict[int, RunRef]


class _Process(tune.Trainable):
    """A process of Ray Tune that runs its trials one by one, each in a thread that waits after each epoch."""

    def setup(self, config: dict[str, Any], task: Task) -> None:
        """Prepare the process and its first trial; Tune calls it once."""
        self._task = task
        log.setup()
        logging.getLogger("cvdist").setLevel(logging.WARNING)  # twenty trainings would log the same lines
        self._thread: threading.Thread | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare the next trial. Returns False if the last one does not end; it then needs another process."""
        before = self._thread
        self.cleanup()
        if before is not None and before.is_alive():
            return False
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        self._best: TrialEpoch | None = None
        self._started = time.monotonic()
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._work, args=(int(new_config["trial"]),), daemon=True)
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch. Returns its results, or what the trial ended with."""
        assert self._thread is not None
        if not self._thread.ident:
            self._thread.start()
        else:
            self._go.release()
        result = self._results.get()
        if self._error is not None:
            raise self._error
        return result

    def cleanup(self) -> None:
        """End the trial, and wait until its results are stored and logged."""
        thread, self._thread = self._thread, None
        if thread is None or not thread.ident:
            return
        self._stopping = True
        self._go.release()
        thread.join(_END_SECONDS)
        gc.collect()  # the model and its optimizer, before the next ones are built
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _work(self, number: int) -> None:
        try:
            self._train(number, self._task)
            self._say(state="failed", reason="it ended before its last epoch")  # so that nobody waits
        except _Stopped:
            if self._last:
                self._results.put(self._last)
        except Superseded as error:
            self._say(state="failed", reason=str(error), whole=True)
        except NotFinite as error:
            self._say(state="diverged", reason=str(error))
        except UserError as error:
            self._say(state="failed", reason=str(error))
        except BaseException as error:  # for Ray Tune, which starts the trial again
            traceback.print_exc()
            self._error = error
            self._results.put({})

    def _train(self, number: int, task: Task) -> None:
        config = configs.replace(task.config, keep_checkpoints=1)  # a large head's take gigabytes
        ranks = RankInfo(
            local_world_size=task.trials_on_node,  # they share the node's disk and memory
            node=ray.util.get_node_ip_address(),
            device=torch.device("cuda", 0) if task.use_gpu else torch.device("cpu"),
        )
        job = Fence.claim_job(f"{task.folder}/{folder_of(number)}")
        no_request = lambda: StopRequest.NONE  # noqa: E731
        with open_worker(
            config, job, task.runs.get(number), ranks, no_request, min_interval=_STORE_SECONDS
        ) as (worker, tracker):
            try:
                try:
                    config = space.apply_settings(config, task.settings[number])
                    run = build_run(config, worker, TrialTracker(tracker, self._epoch_done))
                    if run.info.multilabel:
                        raise UserError(ONE_CLASS_NEEDED)
                except UserError as error:
                    # If one trial can't even begin, the others can't either.
                    self._say(state="failed", reason=str(error), whole=True)
                    return
                train(run)
            finally:
                worker.wait_for_uploads()

    def _epoch_done(self, epoch: TrialEpoch) -> None:
        """Report an epoch to Ray Tune, and wait for the next. The last is reported when all is delivered."""
        if self._stopping:
            raise _Stopped
        if self._best is None or epoch.correct > self._best.correct:
            self._best = epoch  # a run is judged by its best epoch
        result = {
            **dataclasses.asdict(epoch),
            _SCORE: self._best.score,
            "seconds": time.monotonic() - self._started,
            "state": "running",
        }
        if epoch.epoch >= self._task.epochs:
            self._last = {**result, "state": "finished", "done": True}
            raise _Stopped
        self._results.put(result)
        self._go.acquire()
        if self._stopping:
            raise _Stopped

    def _say(self, **values: Any) -> None:
        self._results.put({_EPOCH: 0, _SCORE: -1.0, "done": True, **values})


# ------------------------------------------------------------------------------------------------- all of them


class Watch(tune.Callback, tune.Stopper):
    """Keeps the results of the trials, shows them, and ends a sweep that can't go on."""

    def __init__(
        self,
        trials: Sequence[Trial],
        runs: Mapping[int, RunRef],
        keep: Callable[[Trial], None],
        ended: Callable[[Trial], None],
        fence: Fence,
    ) -> None:
        """Watch `trials`. `keep` is called after each epoch, to store a trial; `ended` at the end of each."""
        self.trials = {trial.number: trial for trial in trials}
        self.error: UserError | None = None
        self._runs, self._keep, self._ended = runs, keep, ended
        self._line = log.ProgressLine(logger, enabled=True)
        self._fence = FenceWatch(fence)
        self._running: set[int] = set()
        self._before = {trial.number: trial.seconds for trial in trials}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: this is never what stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether to stop the sweep: after an error, or when a newer job has its name."""
        if self._fence.superseded and self.error is None:
            self.error = superseded_by_another_job()
        return self.error is not None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show the trial as running."""
        number = trial.config["trial"]
        self._running.add(number)
        if number in self._runs:
            show_running(self._runs[number])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that the trial does not run; it has failed, and Tune starts it again."""
        self._running.discard(trial.config["trial"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep the results of an epoch of the trial."""
        mine = self.trials[trial.config["trial"]]
        if result.get("whole"):
            self.error = UserError(
                f"trial {mine.number} ({space.format_settings(mine.settings)}): {result['reason']}"
            )
        elif "correct" in result:
            epoch = TrialEpoch(result[_EPOCH], result["correct"], result["total"], result["loss"])
            self._note(mine.with_epoch(epoch, self._before[mine.number] + result["seconds"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note how the trial has ended, where Tune did not meet an error."""
        mine, last = self.trials[trial.config["trial"]], trial.last_result or {}
        self._running.discard(mine.number)
        if self.error is not None:
            return
        state = last.get("state", "stopped")
        if state == "running":
            state = "stopped"
        self._end(dataclasses.replace(mine, state=state, reason=last.get("reason", "")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that the trial has failed too often."""
        mine = self.trials[trial.config["trial"]]
        self._running.discard(mine.number)
        error = trial.get_error() if hasattr(trial, "get_error") else None
        reason = str(getattr(error, "cause", None) or error or "its process died").strip().splitlines()[-1]
        self._end(dataclasses.replace(mine, state="failed", reason=reason))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Show how far the sweep is; Tune calls it every now and then, whether or not there are results."""
        if self._line.due():
            self._line.show(progress(list(self.trials.values()), len(self._running)))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Clear the line of progress."""
        self._line.clear()

    def _end(self, trial: Trial) -> None:
        self._line.clear()
        logger.info("%s", ended_line(trial))
        self._ended(trial)
        self._note(trial)  # last, because a trial that is noted as ended is not looked at again

    def _note(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        try:
            self._keep(trial)
        except UserError as error:
            self.error = error


def progress(trials: Sequence[Trial], running: int) -> str:
    """Format `trials 7/20 done, 2 running, 4 stopped early, best 98.25% (393/400) lr=0.0002`."""
    count = Counter(trial.state for trial in trials)
    lost = count["diverged"] + count["failed"]
    parts = [
        f"trials {count['finished'] + count['stopped'] + lost}/{len(trials)} done",
        f"{running} running",
        f"{count['stopped']} stopped early",
    ]
    if lost:
        parts.append(f"{lost} diverged or failed")
    best = max(trials, key=lambda trial: trial.score)
    if best.best is not None:
        result = log.percent(best.best.correct, best.best.total)
        parts.append(f"best {result} {space.format_settings(best.settings)}")
    return ", ".join(parts)


def ended_line(trial: Trial) -> str:
    """Format the line that says how a trial has ended."""
    result = f", {log.percent(trial.best.correct, trial.best.total)}" if trial.best is not None else ""
    after = f" after epoch {trial.epochs[-1].epoch}" if trial.state == "stopped" and trial.epochs else ""
    # The table has the whole reason.
    reason = f"{trial.reason[:_SHOWN].rpartition(' ')[0]} ..." if len(trial.reason) > _SHOWN else trial.reason
    settings = space.format_settings(trial.settings) + (f": {reason}" if reason else "")
    return f"trial {trial.number:<4} {trial.state}{after}{result}  {settings}"


def run(sweep: SweepConfig, task: Task, watch: Watch, left: Sequence[int]) -> None:
    """Train the trials of the numbers `left` on the connected cluster.

    Raises:
        UserError: if the sweep can't go on.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends this job as any other
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the files that nobody reads
    resources = {
        "cpu": task.config.runtime.cpus_per_worker,
        "gpu": sweep.gpus_per_trial if task.use_gpu else 0,
        "memory": task.memory,
    }
    earlier = [trial for trial in watch.trials.values() if trial.number not in left and trial.epochs]
    with tempfile.TemporaryDirectory(prefix="cvdist-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_Process, task=task), resources),
            param_space={"trial": tune.grid_search(list(left))},
            tune_config=tune.TuneConfig(
                scheduler=build_scheduler(sweep, task.epochs, earlier),
                max_concurrent_trials=sweep.concurrent_trials or None,
                reuse_actors=True,  # a process takes longer to start than a small head to train
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,  # for what it writes and nobody reads
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=task.config.runtime.max_failures),
                callbacks=[watch],
                stop=watch,
                verbose=0,
            ),
        )
        tuner.fit()
    if watch.error is not None:
        raise watch.error


def build_scheduler(sweep: SweepConfig, epochs: int, earlier: Sequence[Trial]) -> TrialScheduler:
    """Build ASHA, with the results of this sweep's earlier jobs, or a scheduler without early stopping."""
    if not sweep.early_stopping:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr=_EPOCH,
        metric=_SCORE,
        mode="max",
        max_t=epochs,
        grace_period=sweep.grace_epochs,
        reduction_factor=sweep.reduction_factor,
    )
    nobody = cast(Any, None)
    for trial in earlier:
        known = cast(Any, SimpleNamespace(trial_id=f"earlier-{trial.number}"))
        scheduler.on_trial_add(nobody, known)
        for epoch in trial.epochs:
            best = trial.after(epoch.epoch)
            assert best is not None
            scheduler.on_trial_result(nobody, known, {_EPOCH: epoch.epoch, _SCORE: best.score})
    return scheduler
