"""`make soak`: jobs under random faults for some minutes; each must end as if nothing had happened.

python tests/cluster/soak.py [MINUTES] [SEED] [--debug]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.harness import Cluster, Job, Node, last_position
from tests.cluster.outcome import (
    SAMPLES,
    TRAINING,
    Weights,
    reference_weights,
    require_complete_run,
    require_same_weights,
    undisturbed_training,
)
from tests.helpers.jobs import ROOT
from tests.helpers.network import reason_to_skip
from tests.helpers.waiting import Stalled

EPOCHS = 60
PAUSE = (5.0, 25.0)
"""Fewest and most seconds between two faults."""
FAULTS_IN_A_ROW = 3
"""So many faults may hit a job before it gets further; then the next one waits until it has."""
SILENCE = 30.0
"""Seconds without a line after which one tells what is going on."""
LOGS = ROOT / "runs" / "soak"
"""Where the logs of jobs that ended wrong are kept."""


class Stopped(BaseException):
    """A signal asks the soak to end; like `KeyboardInterrupt`, it passes handlers of ordinary errors."""

    def __init__(self, number: int) -> None:
        """`number`: of the signal."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class ClusterFailed(Exception):
    """The cluster could not be brought back to what the jobs need."""


class Console:
    """Prints lines with the time; after `SILENCE` without one, it prints what is going on."""

    def __init__(self) -> None:
        """Nothing is going on yet."""
        self._doing: Callable[[], str] | None = None
        self._said_at = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._break_silence, daemon=True).start()

    def say(self, text: str) -> None:
        """Print a line now."""
        with self._lock:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
            self._said_at = time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str, progress: Callable[[], str] | None = None) -> Iterator[None]:
        """During the block, `what` is going on, and `progress` tells how far it has got."""
        before, began = self._doing, time.monotonic()

        def describe() -> str:
            seconds = f"{what}, for {time.monotonic() - began:.0f} s"
            return f"{seconds}: {progress()}" if progress else seconds

        self._doing = describe
        try:
            yield
        finally:
            self._doing = before

    def _break_silence(self) -> None:
        while True:
            time.sleep(1)
            doing = self._doing
            if doing is not None and time.monotonic() - self._said_at >= SILENCE:
                try:
                    text = doing()
                except Exception as error:  # e.g. a file that is not there any more
                    text = f"the progress can't be read: {one_line(error)}"
                self.say(f"... {text}")


@dataclass
class Row:
    """What happened to a job, and how it ended."""

    name: str
    began: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    end: str = ""
    verdict: str = "unfinished"
    """`good`, `WRONG` or `unfinished`."""

    def __str__(self) -> str:
        """A line of the table."""
        counts = ", ".join(f"{count} x {fault}" for fault, count in self.faults.most_common())
        return f"{self.name}: {self.verdict}, {self.seconds:.0f} s, {counts or 'no fault'}: {self.end}"


class Soak:
    """Jobs on one cluster, one after the other, and the faults that hit them."""

    def __init__(self, folder: Path, minutes: float, seed: int) -> None:
        """Keep the cluster's files in `folder`, and begin jobs for so many `minutes`."""
        self.rows: list[Row] = []
        self._folder, self._minutes, self._seed = folder, minutes, seed
        self._random = random.Random(seed)
        self._console = Console()

    def run(self) -> None:
        """Train the reference, start the cluster, and submit jobs until the time is over.

        Raises:
            Exception: If the soak itself can't go on, e.g. as a node does not join.
        """
        self._console.say(
            f"soak of {self._minutes:g} minutes, seed {self._seed}: jobs of {EPOCHS} epochs, and a fault every "
            f"{PAUSE[0]:g} to {PAUSE[1]:g} s"
        )
        reference = self._reference()
        with contextlib.ExitStack() as stack:
            with self._console.doing("starting the cluster"):
                began = time.monotonic()
                cluster = Cluster(self._folder, report=self._console.say)
                stack.callback(self._close, cluster)
                cluster.add_node(), cluster.add_node()
                cluster.ready(2)
                self._console.say(f"the cluster has its nodes after {time.monotonic() - began:.0f} s")
            deadline = time.monotonic() + 60 * self._minutes
            while time.monotonic() < deadline:
                self._job(cluster, reference)

    def table(self) -> str:
        """Each job, how many ended well, and how often each fault was injected."""
        good = sum(row.verdict == "good" for row in self.rows)
        struck = sum((row.faults for row in self.rows), Counter[str]())
        return "\n".join(
            [
                "",
                *map(str, self.rows),
                f"{good} of {len(self.rows)} jobs ended as the reference, with a complete run; "
                f"seed {self._seed}; {struck.total()} faults",
                *(f"  {count:3} x {fault}" for fault, count in struck.most_common()),
            ]
        )

    def _close(self, cluster: Cluster) -> None:
        with self._console.doing("ending the cluster"):
            cluster.close()

    def _reference(self) -> Weights:
        began = time.monotonic()
        self._console.say(f"reference training: {EPOCHS} epochs of two workers that nothing happens to")
        with (
            undisturbed_training(self._folder, EPOCHS) as training,
            self._console.doing("reference training", lambda: last_position(training.log())),
        ):
            weights = reference_weights(training, EPOCHS)
        self._console.say(f"reference training done in {time.monotonic() - began:.0f} s")
        return weights

    def _job(self, cluster: Cluster, reference: Weights) -> None:
        """Submit a job, inject faults until it ends, and judge what it has left."""
        row = Row(f"soak-{len(self.rows) + 1}")
        self.rows.append(row)
        try:
            with self._console.doing(f"submitting {row.name}"):
                job = cluster.submit(
                    *(*TRAINING, "--epochs", str(EPOCHS), "--name", row.name),
                    # The number of faults grows with the time that the job takes.
                    *("--max-failures", "100", "--resource-timeout", "600"),
                )
            self._console.say(f"{row.name}  submitted")
            with self._console.doing(row.name, job.seen):
                try:
                    Faults(cluster, job, row, self._random, self._console).strike_until_the_end()
                    job.end()
                    require_same_weights(cluster, row.name, reference, EPOCHS)
                    attempts = require_complete_run(cluster, row.name, EPOCHS)["cvdist.attempt"]
                except AssertionError as error:
                    self._wrong(row, job, error)
                else:
                    row.verdict = "good"
                    row.end = f"as the reference, {EPOCHS * SAMPLES} samples, {attempts} attempts"
        except BaseException as error:
            row.end = row.end or one_line(error)
            raise
        finally:
            row.seconds = time.monotonic() - row.began
            self._console.say(str(row))

    def _wrong(self, row: Row, job: Job, error: AssertionError) -> None:
        """Keep the log of a job that ended wrong; stop it where it hangs."""
        LOGS.mkdir(parents=True, exist_ok=True)
        file = LOGS / f"seed-{self._seed}-{row.name}.log"
        file.write_text(f"{job.log()}\n{error}\n")
        row.verdict, row.end = "WRONG", f"{one_line(error)} (log: {file})"
        if isinstance(error, Stalled):
            job.stop()


class Faults:
    """Strikes one job."""

    def __init__(self, cluster: Cluster, job: Job, row: Row, random_: random.Random, console: Console) -> None:
        """The faults are drawn from `random_`, and counted in `row`."""
        self._cluster, self._job, self._row, self._random, self._console = cluster, job, row, random_, console
        self._kinds: dict[str, Callable[[], str]] = {
            "worker killed": self._kill_worker,
            "node powered off": self._power_off,
            "cable cut": self._cut_cable,
            "503 for 5 s": self._refuse,
            "S3 killed": self._kill_s3,
            "MLflow killed": self._kill_mlflow,
        }

    def strike_until_the_end(self) -> None:
        """Inject a fault every few seconds while the job trains; returns when it has ended.

        Raises:
            AssertionError: If the job hangs.
            ClusterFailed: If a fault could not be repaired.
        """
        struck_at, in_a_row = "", 0
        while not self._ends_before_next(struck_at if in_a_row >= FAULTS_IN_A_ROW else None):
            position = last_position(self._job.log())
            if not position:
                continue
            in_a_row = in_a_row + 1 if position == struck_at else 1
            struck_at = position
            self._strike(self._random.choice(list(self._kinds)), position)

    def _ends_before_next(self, stuck_at: str | None) -> bool:
        """Wait until the next fault is due, and until training is not `stuck_at` any more.

        Returns:
            Whether the job has ended by then.
        """
        due = time.monotonic() + self._random.uniform(*PAUSE)

        def over() -> bool:
            if self._job.status() in Job.ENDED:
                return True
            return time.monotonic() >= due and last_position(self._job.log()) != stuck_at

        self._job.wait(
            over, "the next fault is due" if stuck_at is None else f"it gets further than {stuck_at}"
        )
        return self._job.status() in Job.ENDED

    def _strike(self, fault: str, position: str) -> None:
        self._row.faults[fault] += 1
        name = f"{self._row.name}  fault {self._row.faults.total()}: {fault}"
        self._console.say(f"{name}, at {position}")
        began = time.monotonic()
        with self._console.doing(name, self._job.seen):
            try:
                repaired = self._kinds[fault]()
            except AssertionError as error:
                raise ClusterFailed(str(error)) from error
        if repaired:
            self._console.say(f"{name}: {repaired} after {time.monotonic() - began:.0f} s")

    def _victim(self) -> Node:
        nodes = self._cluster.nodes
        return self._random.choice([node for node in nodes if node.workers()] or nodes[1:])

    def _kill_worker(self) -> str:
        for pid in list(self._victim().workers())[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return ""

    def _power_off(self) -> str:
        victim = self._victim()
        victim.power_off()
        return self._replace(victim)

    def _cut_cable(self) -> str:
        victim = self._victim()
        victim.cut_cable()
        return self._replace(victim)

    def _replace(self, victim: Node) -> str:
        added = self._cluster.add_node()
        self._cluster.ready(2)
        self._cluster.remove(victim)
        return f"{added.name} has joined for {victim.name}"

    def _refuse(self) -> str:
        self._cluster.proxy.begin_to_refuse()
        time.sleep(5)
        self._cluster.proxy.slow_down = False
        return ""

    def _kill_s3(self) -> str:
        self._cluster.s3.stop(kill=True)
        self._cluster.s3.start()
        return ""

    def _kill_mlflow(self) -> str:
        self._cluster.mlflow.kill()
        time.sleep(3)
        self._cluster.mlflow.start()
        return ""


def one_line(error: BaseException) -> str:
    """What an error says, as one line; with its type where that is not one of those made for people."""
    text = str(error).strip().partition("\n")[0]
    if text and isinstance(error, AssertionError | ClusterFailed | Stopped):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line's `minutes`, `seed` and `debug`; exits with code 2 and one line if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("minutes", nargs="?", type=float, default=30.0, help="no job begins later; 30")
    parser.add_argument("seed", nargs="?", type=int, default=0, help="of the faults and their times; 0")
    parser.add_argument("--debug", action="store_true", help="show the traceback if the soak itself fails")
    arguments = parser.parse_args(words)
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        parser.error(f"MINUTES is {arguments.minutes:g}: it takes a number above 0")
    if reason := reason_to_skip():
        parser.exit(2, f"error: the soak {reason}\n")
    return arguments


def main() -> int:
    """Run, then print the table; the exit code is 0 only if all jobs ended as they should."""
    arguments = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    folder = Path(tempfile.mkdtemp(prefix="cvs-", dir="/tmp"))  # Ray's socket names have to be short
    soak = Soak(folder, arguments.minutes, arguments.seed)
    code, reason = 0, ""
    try:
        soak.run()
    except (Exception, Stopped) as error:
        if arguments.debug:
            traceback.print_exc()
        code = error.exit_code if isinstance(error, Stopped) else 1
        reason = f"the soak has ended early: {one_line(error)}"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what is left to do takes a moment
    shutil.rmtree(folder, ignore_errors=True)
    if reason:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    print(soak.table(), flush=True)
    return code or int(any(row.verdict != "good" for row in soak.rows))


if __name__ == "__main__":
    sys.exit(main())
