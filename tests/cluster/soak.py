"""`make soak`: jobs under faults from a seeded list, for some minutes; each ends with the reference weights.

python tests/cluster/soak.py [MINUTES] [SEED]
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.conftest import TRAINING, undisturbed
from tests.cluster.harness import Cluster, Job, reason_to_skip
from tests.cluster.test_faults import require_same_weights, require_whole_run

EPOCHS = 60
HANGS = 1500.0  # seconds after which a job does
FAULTS = ("worker killed", "node powered off", "cable cut", "503 for 5 s", "S3 killed", "MLflow killed")


def strike(cluster: Cluster, fault: str, random_: random.Random) -> None:
    """Do one thing to the cluster, and mend what a person would mend."""
    busy = [node for node in cluster.nodes if node.workers()] or cluster.nodes[1:]
    victim = random_.choice(busy)
    if fault == "worker killed":
        for pid in list(victim.workers())[:1]:
            os.kill(pid, signal.SIGKILL)
    elif fault in ("node powered off", "cable cut"):
        victim.power_off() if fault == "node powered off" else victim.cut_cable()
        cluster.add_node()
        cluster.ready(2)
        cluster.remove(victim)
    elif fault == "503 for 5 s":
        cluster.proxy.begin_to_refuse()
        time.sleep(5)
        cluster.proxy.slow_down = False
    elif fault == "S3 killed":
        cluster.s3.stop(kill=True)
        cluster.s3.start()
    else:
        cluster.mlflow.kill()
        time.sleep(3)
        cluster.mlflow.start()


def main() -> int:
    """Run, then print the table; 1 if a job has ended otherwise than it should."""
    try:
        minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    except ValueError as error:
        print(f"error: MINUTES and SEED are numbers: {error}", file=sys.stderr)
        return 2
    if reason := reason_to_skip():
        print(f"error: the soak {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so through `finally`
    random_, struck, rows = random.Random(seed), Counter[str](), []
    folder = Path(tempfile.mkdtemp(prefix="cvs-", dir="/tmp"))
    reference = undisturbed(folder, EPOCHS)
    cluster = Cluster(folder)
    try:
        cluster.add_node(), cluster.add_node()
        cluster.ready(2)
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline:
            name = f"soak-{len(rows) + 1}"
            job = cluster.submit(*TRAINING, "--epochs", str(EPOCHS), "--max-failures", "20", "--name", name)
            rows.append(_round(cluster, job, name, reference, random_, struck))
            print(rows[-1], flush=True)
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
    good = sum("as the reference" in row for row in rows)
    print(f"\n{good} of {len(rows)} jobs ended with the reference weights and whole runs; seed {seed}")
    print("\n".join(f"  {count:3} x {fault}" for fault, count in struck.most_common()))
    return int(good < len(rows))


def _round(
    cluster: Cluster, job: Job, name: str, reference: dict, random_: random.Random, struck: Counter[str]
) -> str:
    began, faults = time.monotonic(), []
    while job.status() not in ("SUCCEEDED", "FAILED", "STOPPED") and time.monotonic() < began + HANGS:
        pause = time.monotonic() + random_.uniform(5, 25)
        while time.monotonic() < pause and job.status() in ("PENDING", "RUNNING"):
            time.sleep(0.5)
        if job.status() == "RUNNING" and "train loss" in job.log():
            faults.append(random_.choice(FAULTS))
            struck[faults[-1]] += 1
            strike(cluster, faults[-1], random_)
    try:
        job.end()
        require_same_weights(cluster, name, reference, EPOCHS)
        attempts = require_whole_run(cluster, name, EPOCHS)["cvdist.attempt"]
        end = f"as the reference, {EPOCHS * 4000} samples, {attempts} attempts"
    except AssertionError as error:
        log = Path(tempfile.gettempdir()) / f"{name}.log"
        log.write_text(f"{job.log()}\n{error}\n")
        end = f"WRONG, see {log}"
    counts = ", ".join(f"{count} x {fault}" for fault, count in Counter(faults).most_common())
    return f"{name}: {time.monotonic() - began:.0f} s, {counts or 'no fault'}: {end}"


if __name__ == "__main__":
    sys.exit(main())
