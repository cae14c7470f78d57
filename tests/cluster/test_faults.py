"""Whatever fails on a cluster: the job ends with the weights of an uninterrupted one, and in one whole run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pyarrow import fs as arrow

from tests.cluster.conftest import EPOCHS, TRAINING, weights
from tests.cluster.harness import BIN, Cluster, Job
from tests.conftest import wait_until

ALL = ("--epochs", str(EPOCHS))
STEPS = 63  # an epoch
# The windows that step metrics are measured over end here: every 10 steps, at checkpoints, at the epoch's end.
LOGGED = [10, 20, 30, 40, 50, 60, 63]

pytestmark = pytest.mark.timeout(600)


def bucket(cluster: Cluster) -> arrow.S3FileSystem:
    keys = cluster.s3.environment
    return arrow.S3FileSystem(
        access_key=keys["AWS_ACCESS_KEY_ID"],
        secret_key=keys["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        endpoint_override=keys["AWS_ENDPOINT_URL"],
    )


def checkpoints(cluster: Cluster, name: str) -> list[str]:
    listed = bucket(cluster).get_file_info(arrow.FileSelector(f"bucket/runs/{name}", recursive=True))
    return sorted(i.path.split("/")[-2] for i in listed if i.path.endswith("/checkpoint.json"))


def require_same_weights(
    cluster: Cluster, name: str, reference: dict[str, torch.Tensor], epochs: int = EPOCHS
) -> None:
    (last,) = [c for c in checkpoints(cluster, name) if re.match(rf"epoch-{epochs:04}(-attempt-[\d.]+)?$", c)]
    with bucket(cluster).open_input_file(f"bucket/runs/{name}/{last}/state.pt") as file:
        reached = weights(io.BytesIO(file.read()))
    require_equal(reached, reference)


def require_equal(reached: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert reached.keys() == reference.keys()
    for key, tensor in reference.items():
        assert torch.equal(reached[key], tensor), key


def require_whole_run(
    cluster: Cluster, name: str, epochs: int = EPOCHS, *, more: bool = False
) -> dict[str, str]:
    """One finished run that has each metric once, and each sample in each epoch; its tags.

    more: step metrics may also lie at checkpoints that nobody could foresee.
    """
    client = MlflowClient(cluster.mlflow.uri)
    experiment = client.get_experiment_by_name("cvdist").experiment_id
    (found,) = client.search_runs([experiment], f"tags.`cvdist.name` = '{name}'")
    assert found.info.status == "FINISHED"
    history = lambda metric: client.get_metric_history(found.info.run_id, metric)  # noqa: E731
    assert [metric.step for metric in history("valid/correct")] == list(range(1, epochs + 1))
    wanted = [epoch * STEPS + step for epoch in range(epochs) for step in LOGGED]
    steps = [metric.step for metric in history("step/loss")]
    assert steps == sorted(set(steps)) and set(wanted) <= set(steps)
    assert more or steps == wanted
    assert sum(metric.value for metric in history("step/total")) == epochs * 4000
    attempts = [metric.value for metric in history("run/attempt")]
    assert attempts[-1] == float(found.data.tags["cvdist.attempt"])
    return found.data.tags


def test_workers_and_nodes_that_are_lost(cluster: Cluster, reference: dict[str, torch.Tensor]) -> None:
    """A worker is killed, and what watches it; a node goes; one is cut off; the head's disk is full."""
    job = cluster.submit(*TRAINING, *ALL, "--name", "lost")
    job.wait_for(r"epoch 1/\d+  train")
    with goes_on(job, "a killed worker"):
        os.kill(next(pid for node in cluster.nodes for pid in node.workers()), signal.SIGKILL)
    with goes_on(job, "a killed controller of Ray Train"):
        (pid,) = cluster.nodes[0].processes("TrainController")
        os.kill(pid, signal.SIGKILL)
    job.wait_for(r"epoch 3/\d+  train")
    victim = next(node for node in cluster.nodes if node.workers())
    with goes_on(job, "a node without power"):
        victim.power_off()
        cluster.remove(victim)
        cluster.add_node()
    job.wait_for(r"epoch 5/\d+  train")
    # The node of rank 0, which writes; its processes go on.
    address = re.findall(r"RayTrainWorker pid=\d+, ip=([\d.]+)\)[^\n]* data       ", job.log())[-1]
    victim = next(node for node in cluster.nodes if node.address == address)
    with goes_on(job, "a cut cable"):
        victim.cut_cable()
        cluster.add_node()
    victim.mend_cable()  # what still runs there, a stale writer, reaches the storage and the tracker again
    cluster.nodes[
        0
    ].fill_disk()  # the head's, where Ray keeps the job's log: its last words are lost, and no more
    try:
        job.end()
    finally:
        cluster.nodes[0].free_disk()
    require_same_weights(cluster, "lost", reference)
    assert int(require_whole_run(cluster, "lost")["cvdist.attempt"]) >= 5
    cluster.remove(victim)
    cluster.ready(2)


@contextlib.contextmanager
def goes_on(job: Job, what: str) -> Iterator[None]:
    """What is done to `job` in the block leads to a restart from its last checkpoint."""
    count = lambda: len(re.findall(r"resuming   at epoch \d+, sample \d+", job.log()))  # noqa: E731
    before, began = count(), time.monotonic()
    yield
    job.wait(lambda: count() > before, f"it goes on after {what}")
    print(
        f"{what}: {time.monotonic() - began:.0f} s of Ray's detection and restart until training went on, "
        "and at most 20 steps to be done again"
    )


def test_storage_and_tracker_that_go_away(cluster: Cluster, reference: dict[str, torch.Tensor]) -> None:
    """And a slow network, and clocks that step back by an hour on all nodes: nobody is to go by them."""
    job = cluster.submit(*TRAINING, *ALL, "--name", "away")
    job.wait_for(r"epoch 1/\d+  train")
    for node in cluster.nodes:
        node.set_clock(-3600)
    cluster.proxy.begin_to_refuse()
    time.sleep(5)
    cluster.proxy.slow_down = False
    assert cluster.proxy.refused > 0
    for node in cluster.nodes[1:]:
        node.limit_rate("8mbit")
    time.sleep(5)
    for node in cluster.nodes[1:]:
        node.limit_rate()
    job.wait_for(r"epoch 3/\d+  train")
    cluster.s3.stop(kill=True)
    cluster.mlflow.kill()
    time.sleep(3)
    cluster.s3.start()
    job.wait_for(r"MLflow is away")
    cluster.mlflow.start()
    log = job.end()
    for node in cluster.nodes:
        node.set_clock(0)
    assert len(set(re.findall(r"(\d\d):\d\d:\d\d epoch \d+/\d+  train", log))) > 1, "the clocks went on"
    assert "MLflow is back after" in log
    assert re.search(r"  storage  +[1-9]\d* requests slow or tried again, 0 failed, [1-9]\d* s lost", log), log
    assert "resuming" not in log, "the workers had to be started again"
    require_same_weights(cluster, "away", reference)
    assert require_whole_run(cluster, "away")["cvdist.attempt"] == "1"


def test_sigterm_to_one_of_two_nodes_under_torchrun(
    cluster: Cluster, reference: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    words = (*TRAINING, "--name", "torchrun")
    pair = cluster.torchrun(*words, "--epochs", "500", storage=tmp_path)
    text = lambda: pair[0].log.read_text()  # noqa: E731
    wait_until(lambda: "epoch 1/500  train" in text(), 120, "an epoch is done")
    pair[1].process.terminate()  # rank 0 is on the other one, which hears of it from this one's worker
    assert all(one.process.wait(60) != 0 for one in pair)
    assert "stopped by SIGTERM after a checkpoint: --name torchrun goes on from it" in text(), text()
    pair = cluster.torchrun(*words, *ALL, storage=tmp_path)
    assert [one.process.wait(120) for one in pair] == [0, 0], text()
    assert re.search(r"resuming   at epoch \d+, sample \d+", text())
    reached = weights(next((tmp_path / "torchrun").glob(f"epoch-{EPOCHS:04}*/state.pt")))
    require_equal(reached, reference)
    assert require_whole_run(cluster, "torchrun", more=True)["cvdist.attempt"] == "2"


@pytest.mark.slow
def test_two_jobs_of_one_name_and_a_damaged_checkpoint(
    cluster: Cluster, reference: dict[str, torch.Tensor]
) -> None:
    older = cluster.submit(*TRAINING, "--name", "twice", "--epochs", "500")
    older.wait_for(r"epoch 1/\d+  train")
    (pid, *_) = [pid for node in cluster.nodes for pid in node.workers()]
    os.kill(pid, signal.SIGSTOP)  # it hangs, and somebody starts the job anew
    newer = cluster.submit(*TRAINING, "--name", "twice", "--epochs", str(EPOCHS // 2))
    newer.wait_for(r"run        twice \(continued\)")
    os.kill(pid, signal.SIGCONT)
    log = older.end("FAILED")
    (line,) = re.findall(r"error: (another job of this --name has begun.*)", log)
    assert "this one stops" in line and "resuming" not in log, log
    newer.end()
    newest = checkpoints(cluster, "twice")[-1]
    path = f"bucket/runs/twice/{newest}/state.pt"
    with bucket(cluster).open_input_file(path) as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    with bucket(cluster).open_output_stream(path) as file:
        file.write(content)
    log = cluster.submit(*TRAINING, *ALL, "--name", "twice").end()
    assert f"checkpoint {newest} of this run is damaged" in log and "trying the one before" in log
    require_same_weights(cluster, "twice", reference)
    require_whole_run(cluster, "twice")


def test_a_preemption_notice_leads_to_a_checkpoint_and_costs_no_failure(
    cluster: Cluster, reference: dict[str, torch.Tensor]
) -> None:
    job = cluster.submit(
        *TRAINING, *ALL, "--name", "spot", "--max-failures", "0", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1"
    )
    job.wait_for(r"epoch 1/\d+  train")
    victim = next(node for node in cluster.nodes if node.workers())
    (pid,) = victim.workers()
    os.kill(pid, signal.SIGSTOP)  # or a fast machine might be done before the notice arrives
    listed = cluster.ask("/nodes?view=summary")["data"]["summary"]
    (identity,) = [item["raylet"]["nodeId"] for item in listed if item["ip"] == victim.address]
    subprocess.run(
        [
            *(
                str(BIN / "ray"),
                "drain-node",
                "--address",
                cluster.environment["RAY_ADDRESS"],
                "--node-id",
                identity,
            ),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", "12"),
        ],
        env={**cluster.node_environment, **cluster.environment},
        check=True,
        capture_output=True,
        timeout=60,
    )
    os.kill(pid, signal.SIGCONT)
    cluster.add_node()
    job.wait_for(r"nodes with 1 of the workers will be taken away in \d+ s: saving")
    time.sleep(12)
    victim.power_off()
    cluster.remove(victim)
    job.end()
    require_same_weights(cluster, "spot", reference)
    require_whole_run(cluster, "spot", more=True)
    cluster.ready(2)


@pytest.mark.slow
def test_fewer_and_more_workers_see_each_sample_once(cluster: Cluster) -> None:
    epochs = 20
    job = cluster.submit(
        *(*TRAINING, "--epochs", str(epochs), "--name", "elastic"),
        *("--num-workers", "1:2", "--resize-interval", "3", "--start-timeout", "60"),
    )
    job.wait_for(rf"(?s)workers    2 on .*epoch 1/{epochs}  train")
    victim = next(node for node in cluster.nodes if node.workers())
    victim.power_off()
    cluster.remove(victim)
    job.wait_for(r"(?s)workers    1 on .*resuming   at epoch \d+, sample \d+", 240)
    (pid,) = [pid for node in cluster.nodes for pid in node.workers()]
    os.kill(pid, signal.SIGSTOP)  # or a fast machine might be done before there is another node
    cluster.add_node()
    cluster.ready(2)
    with contextlib.suppress(ProcessLookupError):  # Ray may have taken its place by then
        os.kill(pid, signal.SIGCONT)
    job.wait_for(r"(?s)workers    1 on .*workers    2 on ", 240)
    best = re.search(r"best accuracy  ([\d.]+)%", job.end())
    assert best and float(best[1]) > 95
    require_whole_run(cluster, "elastic", epochs)
    cluster.ready(2)
