"""Whatever fails on a cluster, a job ends with the weights of an undisturbed one, and in one complete run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster.harness import Cluster, Job
from tests.cluster.outcome import (
    EPOCHS,
    TRAINING,
    Weights,
    bucket,
    checkpoints,
    require_complete_run,
    require_same_weights,
)
from tests.helpers.waiting import wait_until

ALL = ("--epochs", str(EPOCHS))

# Waits end by themselves when nothing moves; this ends a job that moves and gets nowhere.
pytestmark = pytest.mark.timeout(3600)


def test_workers_and_nodes_that_are_lost(cluster: Cluster, reference: Weights) -> None:
    """Ray Train's controller is killed; a node loses power; one is cut off; the head's disk is full."""
    job = cluster.submit(*TRAINING, *ALL, "--name", "lost", "--verbose")  # Ray names the nodes of the lines
    job.wait_for(r"epoch 1/\d+  train")
    with resumes_after(job, "a killed controller of Ray Train"):
        (pid,) = cluster.nodes[0].processes("TrainController")
        os.kill(pid, signal.SIGKILL)
    job.wait_for(r"epoch 3/\d+  train")
    victim = next(node for node in cluster.nodes if node.workers())
    with resumes_after(job, "a node without power"):
        victim.power_off()
        cluster.remove(victim)
        cluster.add_node()
    job.wait_for(r"epoch 5/\d+  train")
    # The node of rank 0, which writes; its processes go on.
    address = re.findall(r"RayTrainWorker pid=\d+, ip=([\d.]+)\)[^\n]* data       ", job.log())[-1]
    victim = next(node for node in cluster.nodes if node.address == address)
    with resumes_after(job, "a cut cable"):
        victim.cut_cable()
        cluster.add_node()
    # What still runs there, a stale writer, reaches the storage and the tracker again.
    victim.machine.restore_cable()
    # Ray keeps the job's log there: its last lines are lost, and no more. A node on which Ray starts processes
    # without room for their logs may end, so the workers have to be there.
    job.wait_for(r"(?s)(resuming   at epoch.*){3}epoch \d+/\d+  train")
    head = cluster.nodes[0]
    head.fill_disk()
    try:
        job.end()
    finally:
        head.free_disk()
    require_same_weights(cluster, "lost", reference)
    assert int(require_complete_run(cluster, "lost")["cvdist.attempt"]) >= 4
    cluster.remove(victim)
    cluster.ready(2)


@contextlib.contextmanager
def resumes_after(job: Job, fault: str) -> Iterator[None]:
    """Require that `job` resumes from its last checkpoint after the fault that the block causes."""
    count = lambda: len(re.findall(r"resuming   at epoch \d+, sample \d+", job.log()))  # noqa: E731
    before, began = count(), time.monotonic()
    yield
    job.wait(lambda: count() > before, f"it resumes after {fault}")
    print(
        f"{fault}: {time.monotonic() - began:.0f} s of Ray's detection and restart until training resumed, "
        "and at most 20 steps to be done again"
    )


def test_a_node_is_taken_back_and_storage_and_tracker_go_away(cluster: Cluster, reference: Weights) -> None:
    """A notice of preemption; S3 refuses, then is killed, and MLflow with it; a slow network; clocks step back.

    No fault counts as a failure, and only the loss of the node costs a restart.
    """
    job = cluster.submit(
        *TRAINING, *ALL, "--name", "away", "--max-failures", "0", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1"
    )
    job.wait_for(r"epoch 1/\d+  train")
    victim = next(node for node in cluster.nodes if node.workers())
    (pid,) = victim.workers()
    os.kill(pid, signal.SIGSTOP)  # or a fast machine might be done before the notice arrives
    cluster.drain(victim, seconds=12)
    os.kill(pid, signal.SIGCONT)
    cluster.add_node()
    job.wait_for(r"nodes with 1 of the workers will be taken away in \d+ s: saving")
    with resumes_after(job, "a node that is taken back"):
        time.sleep(4)  # sooner than announced: the training goes on, and has to be far from its end
        victim.power_off()
        cluster.remove(victim)
    (pid, *_) = [pid for node in cluster.nodes for pid in node.workers()]
    os.kill(pid, signal.SIGSTOP)  # or a fast machine might be done before the faults begin
    for node in cluster.nodes:
        node.set_clock(-3600)
    refused = cluster.proxy.refused
    cluster.proxy.begin_to_refuse()
    os.kill(pid, signal.SIGCONT)
    job.wait(lambda: cluster.proxy.refused > refused, "a request to S3 is refused")
    time.sleep(3)
    cluster.proxy.slow_down = False
    for node in cluster.nodes[1:]:
        node.machine.limit_rate("8mbit")
    time.sleep(5)
    for node in cluster.nodes[1:]:
        node.machine.limit_rate()
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
    assert re.search(r"  storage  +[1-9]\d* requests slow, tried again or failed, [1-9]\d* s lost", log), log
    assert log.count("resuming   at epoch") == 1, "the workers had to be started again"
    require_same_weights(cluster, "away", reference)
    assert require_complete_run(cluster, "away", more_steps=True)["cvdist.attempt"] == "2"
    cluster.ready(2)


@pytest.mark.slow
def test_two_jobs_of_one_name_and_a_damaged_checkpoint(cluster: Cluster, reference: Weights) -> None:
    older = cluster.submit(*TRAINING, "--name", "twice", "--epochs", "500")
    older.wait_for(r"epoch 1/\d+  train")
    (pid, *_) = [pid for node in cluster.nodes for pid in node.workers()]
    os.kill(pid, signal.SIGSTOP)  # it hangs, and somebody submits the job again
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
    require_complete_run(cluster, "twice")


@pytest.mark.slow
def test_a_job_that_is_submitted_again_after_its_head_was_lost(cluster: Cluster, reference: Weights) -> None:
    """What KubeRay does with a lost head; the workers of the first submission are cut off, and go on later."""
    first = cluster.submit(*TRAINING, "--name", "headless", "--epochs", "500")
    first.wait_for(r"epoch 2/\d+  train")
    old = cluster.nodes[1:]
    raylets = [pid for node in old for pid in node.processes("raylet", program="raylet")]
    workers = [pid for node in old for pid in node.workers()]
    assert len(raylets) == len(workers) == 2
    for pid in (*raylets, *workers):
        os.kill(pid, signal.SIGSTOP)
    for node in old:
        node.lost = True
    cluster.restart_head()
    cluster.add_node(), cluster.add_node()
    cluster.ready(2)
    second = cluster.submit(*TRAINING, *ALL, "--name", "headless")
    second.wait_for(r"(?s)run        headless \(continued\).*resuming   at epoch \d+, sample \d+")
    for pid in workers:
        os.kill(pid, signal.SIGCONT)

    def fenced_off() -> bool:
        logs = [file.read_text(errors="replace") for node in old for file in node.folder.rglob("worker-*")]
        return any("another job of this --name has begun" in log for log in logs)

    wait_until(fenced_off, "a worker of the first submission says why it stops", second.seen)
    second.end()
    for node in old:
        cluster.remove(node)
    require_same_weights(cluster, "headless", reference)
    require_complete_run(cluster, "headless")


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
    job.wait_for(r"(?s)workers    1 on .*resuming   at epoch \d+, sample \d+")
    (pid,) = [pid for node in cluster.nodes for pid in node.workers()]
    os.kill(pid, signal.SIGSTOP)  # or a fast machine might be done before there is another node
    cluster.add_node()
    cluster.ready(2)
    with contextlib.suppress(ProcessLookupError):  # Ray may have taken its place by then
        os.kill(pid, signal.SIGCONT)
    job.wait_for(r"(?s)workers    1 on .*workers    2 on ")
    best = re.search(r"best accuracy  ([\d.]+)%", job.end())
    assert best and float(best[1]) > 95
    require_complete_run(cluster, "elastic", epochs)
    cluster.ready(2)
