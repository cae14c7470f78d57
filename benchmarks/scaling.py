"""VGG16's classifier on 1, 2 and 4 nodes: split over them against data-parallel, both against the cost model.

Nodes are network namespaces with one process of one thread each, joined by a switch, two of them at last by
1 Gbit/s each way. They train through `train_epoch` from made-up features: 64 pictures a step, layers of
25,088, 4,096, 4,096 and 2. What leaves a node is counted by its network interface. The three data-parallel
ways have weights and momentum in common, for memory; PowerSGD's first steps, which are not compressed, are not
timed.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks import made_up_features
from benchmarks.harness import Comparison, summarize
from benchmarks.scaling_worker import BATCH
from cvdist.parallel import cost
from cvdist.parallel.cost import Cost, Machine, Work
from cvdist.parallel.modes import POWERSGD_START
from tests.helpers.network import Network, SimulatedMachine, reason_to_skip

ROOT = Path(__file__).resolve().parent.parent
GBIT = 1.0
STEPS, SHORT = 5, 2  # of an epoch: with a split head, and with all gradients exchanged
EPOCHS = 4  # of 5 steps: 20 losses; the first is a warm-up for times
ROUNDS = 3  # over the slow link
FLOAT_TOLERANCE = 1e-5
WAYS = {"none": "DDP, float32", "bf16": "DDP, bfloat16", "powersgd": "DDP, PowerSGD"}
_PATIENCE = 180.0  # seconds that any command may take


def measure() -> Iterator[Comparison]:
    """Measure the seconds and bytes of a step, and compare losses."""
    if reason := reason_to_skip():
        print(f"  skipped: {reason}")
        return
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = stack.enter_context(closing(Network()))
        nodes = [network.add(number) for number in range(1, 8)]
        _prepare(root)
        two = stack.enter_context(Group(nodes[1:3], root))
        with Group(nodes[3:], root) as four:
            with Group(nodes[:1], root) as one:
                yield from _split(one, two, four)
            four.ask("drop head")
            yield from _data_parallel((four, two))
        yield from _over_a_slow_link(nodes[1:3], two)


class Group:
    """A group of workers that train together, one per node. As a context manager it ends them."""

    def __init__(self, nodes: Sequence[SimulatedMachine], root: Path) -> None:
        """Start the workers.

        Args:
            nodes: the workers' machines.
            root: folder of caches, weights and logs.
        """
        self.size, self.rates, self.work, self._share = len(nodes), Machine(1.0, 1.0), Work(0, 0.0, 0), 1.0
        self._processes, self._logs = [], []
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "CVDIST_"))}
        for rank, node in enumerate(nodes):
            log = root / f"{node.namespace}.log"
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": nodes[0].address, "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            self._logs.append(log)
            with log.open("w") as file:
                command = node.inside(sys.executable, "-m", "benchmarks.scaling_worker", str(root))
                self._processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=kept | environment, text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                    )
                )  # fmt: skip

    def __enter__(self) -> Group:
        """Return the group."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the workers, and wait until they have ended."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate(timeout=30)

    def tell(self, command: str) -> None:
        """Send a command to all workers, without waiting for their answers."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()

    def answers(self) -> list[Any]:
        """Wait for each worker's answer to the oldest command that is not answered yet."""
        found = []
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            there, _, _ = select.select([process.stdout], [], [], _PATIENCE)
            line = process.stdout.readline() if there else ""
            if not line:
                what = "has ended" if there else f"has not answered within {_PATIENCE:.0f} s"
                raise RuntimeError(f"{log.stem} {what}:\n{log.read_text()[-2000:]}")
            found.append(json.loads(line))
        return found

    def ask(self, command: str) -> list[Any]:
        """Send a command to all workers, and return their answers."""
        self.tell(command)
        return self.answers()

    def epoch(self, name: str, number: int) -> Epoch:
        """Train an epoch with the loop called `name`."""
        return Epoch(self.ask(f"run {name} {number}"))

    def look(self, name: str) -> None:
        """Set the inputs of the cost model: sizes of a step of `name`, and rates of the slowest worker."""
        self.work = Work(**self.ask(f"work {name}")[0])
        rates = self.ask("rates")
        self.rates = Machine(**{key: min(r[key] for r in rates) for key in rates[0] if key != "latency"})
        if self.size > 1:
            self.rates = replace(self.rates, latency=rates[0]["latency"])

    def reach(self, share: float) -> None:
        """Set the fraction of the measured rates that predictions assume."""
        self._share = share

    def predict(self, *, split: bool, gradient_bytes: float = 4.0) -> Cost:
        """Return what the cost model predicts for a step."""
        rates = self.rates
        machine = replace(
            rates, matrix_rate=rates.matrix_rate * self._share, memory_rate=rates.memory_rate * self._share
        )
        return (cost.split_head if split else cost.data_parallel)(self.work, machine, self.size, gradient_bytes)


class Epoch:
    """The measurements of an epoch: losses, and seconds and bytes per step."""

    def __init__(self, answers: list[Any]) -> None:
        """Combine the workers' answers."""
        steps = answers[0]["steps"]
        self.losses = [step["step/loss"] for step in steps]
        self.step = max(answer["seconds"] for answer in answers) / len(steps)
        self.sent = statistics.mean(answer["sent"] for answer in answers) / len(steps)
        self.counted = statistics.mean(step["step/bytes_sent"] for step in steps)


def _prepare(root: Path) -> None:
    """Write the caches, and the weights of the convolutions, which are loaded but never run."""
    for steps in (STEPS, SHORT):
        made_up_features.write(root / f"features-{steps}", steps * BATCH, 2)
    vgg = torchvision.models.vgg16()
    torch.save({f"features.{n}": t for n, t in vgg.features.state_dict().items()}, root / "weights.pth")


def _split(one: Group, two: Group, four: Group) -> Iterator[Comparison]:
    """Compare split heads on 1, 2 and 4 workers: 20 steps each, five as a warm-up; then without dropout."""
    groups = {1: one, 2: two, 4: four}
    for group in groups.values():
        group.tell(f"build head {STEPS} 0.2 head")
    for group in groups.values():
        group.answers()
    for group in groups.values():
        group.look("head")
    runs: dict[int, list[Epoch]] = {workers: [] for workers in groups}
    for number in range(1, EPOCHS + 1):
        for workers, group in groups.items():
            runs[workers].append(group.epoch("head", number))
    steps = {workers: [epoch.step for epoch in epochs[1:]] for workers, epochs in runs.items()}
    yield summarize(
        "split head: a step on 1 worker / on 2 (two cores)",
        list(zip(steps[1], steps[2], strict=True)), unit="s/step", target=1.5,
    )  # fmt: skip
    yield summarize(
        "split head: a step on 4 workers / on 2 (two cores)",
        list(zip(steps[4], steps[2], strict=True)), unit="s/step", target=1.2, at_most=True,
    )  # fmt: skip
    # What the rates leave out, such as small matrices and Python, is told by one worker.
    share = cost.data_parallel(one.work, one.rates, 1).seconds / statistics.median(steps[1])
    for group in groups.values():
        group.reach(share)
        _show(f"split head, {group.size} workers", group, runs[group.size][1:], group.predict(split=True))
    for group in (two, four):
        yield _bytes(f"split head, {group.size} workers", runs[group.size], group.predict(split=True))
    for workers in (2, 4):
        yield _losses(f"{workers} workers, the same dropout", runs[workers], runs[1])
    for group in (one, two):
        group.ask("drop head")
        group.ask(f"build exact {STEPS} 0.0 head")
    for group in (one, two):
        for number in range(1, EPOCHS + 1):
            group.tell(f"run exact {number}")
    plain = [[Epoch(group.answers()) for _ in range(EPOCHS)] for group in (one, two)]
    yield _losses("2 workers, no dropout", plain[1], plain[0])


def _data_parallel(groups: Sequence[Group]) -> Iterator[Comparison]:
    """Measure data-parallel steps with all gradients exchanged: two steps after two as a warm-up."""
    for group in groups:
        group.ask(f"build none {SHORT} 0.2 none")
        group.epoch("none", 1)
        epochs = [group.epoch("none", 2)]
        predicted = group.predict(split=False)
        _show(f"DDP, {group.size} workers", group, epochs, predicted)
        yield _bytes(f"DDP, {group.size} workers", epochs, predicted)


def _over_a_slow_link(nodes: Sequence[SimulatedMachine], two: Group) -> Iterator[Comparison]:
    """Measure all four variants alternately over a slow link."""
    for kind in ("bf16", "powersgd"):
        two.ask(f"build {kind} {SHORT} 0.2 {kind}")
        two.epoch(kind, 1)
        two.ask(f"share {kind} none")
    for number in range(POWERSGD_START // SHORT):  # its first steps are not compressed
        two.epoch("powersgd", 2 + number)
    for node in nodes:
        node.limit_rate(f"{GBIT * 1000:.0f}mbit")
    two.look("exact")
    runs: dict[str, list[Epoch]] = {kind: [] for kind in ("exact", *WAYS)}
    for number in range(ROUNDS):
        for kind, epochs in runs.items():
            epochs.append(two.epoch(kind, 3 + number))
    for kind, name in WAYS.items():
        sent = {"none": 4.0, "bf16": 2.0}.get(kind)
        predicted = two.predict(split=False, gradient_bytes=sent) if sent else None
        _show(f"{name}, {GBIT:g} Gbit/s", two, runs[kind], predicted)
    _show(f"split head, {GBIT:g} Gbit/s", two, runs["exact"], two.predict(split=True))
    for kind, name in WAYS.items():
        pairs = [(theirs.step, ours.step) for theirs, ours in zip(runs[kind], runs["exact"], strict=True)]
        target = 10 if kind == "none" else 1
        yield summarize(f"{name} / split head, {GBIT:g} Gbit/s", pairs, unit="s/step", target=target)


def _show(what: str, group: Group, epochs: Sequence[Epoch], predicted: Cost | None) -> None:
    step = statistics.median(epoch.step for epoch in epochs)
    told = f"{step:.3f} s a step"
    if predicted is not None:
        told += f", {predicted.seconds:.3f} predicted ({predicted.computing:.3f} computing)"
    rates = group.rates
    print(
        f"  {what}: {told}; {rates.matrix_rate / 1e9:,.0f} GFLOP/s, {rates.memory_rate / 1e9:.1f} GB/s, "
        f"link {rates.link_rate * 8e-9:.3g} Gbit/s, {rates.latency * 1e3:.2f} ms",
        flush=True,
    )


def _bytes(what: str, epochs: Sequence[Epoch], predicted: Cost) -> Comparison:
    """Compare sent with predicted bytes: the larger divided by the smaller, so that too few bytes count too."""
    sent, counted = (statistics.mean(getattr(e, name) for e in epochs) for name in ("sent", "counted"))
    print(
        f"  {what}: {sent / 1e6:.3f} MB a step have left a node, {counted / 1e6:.3f} by the run's own metric, "
        f"{predicted.sent / 1e6:.3f} predicted",
        flush=True,
    )
    told = [(value / 1e6, predicted.sent / 1e6) for value in (sent, counted)]
    pairs = [(max(pair), min(pair)) for pair in told]
    worst = max(pairs, key=lambda pair: pair[0] / pair[1])
    return summarize(f"bytes, {what} / predicted", [worst], unit="MB/step", target=1.1, at_most=True)


def _losses(what: str, split: Sequence[Epoch], whole: Sequence[Epoch]) -> Comparison:
    ours, other = ([loss for epoch in epochs for loss in epoch.losses] for epochs in (split, whole))
    assert len(ours) == len(other) == EPOCHS * STEPS
    largest = max(abs(a - b) / b for a, b in zip(ours, other, strict=True))
    print(f"  losses from {other[0]:.4f} to {other[-1]:.4f}, {what}: {largest:.1e} apart at most", flush=True)
    return summarize(
        f"20 losses, {what}: difference / tolerance", [(largest, FLOAT_TOLERANCE)],
        unit="relative", target=1.0, at_most=True,
    )  # fmt: skip
