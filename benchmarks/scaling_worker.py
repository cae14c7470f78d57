"""A worker of `benchmarks/scaling.py`, which executes commands from its standard input; not a benchmark itself.

    build NAME STEPS DROPOUT KIND   build a training loop on the cache of STEPS batches; KIND is head for a
                                    split head, or the compression of gradients: none, bf16 or powersgd
    share NAME OTHER                let two data-parallel loops use the same weights and momentum
    drop NAME                       free the memory of a loop
    run NAME EPOCH                  train an epoch: returns seconds, bytes that left the node, metrics per step
    rates                           measure the rates of this worker while all others do the same
    work NAME                       return the sizes of a step, for the cost model

Each command is answered by one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import TrainConfig, storage_root
from cvdist.distributed.ranks import RankInfo
from cvdist.parallel import measure
from cvdist.runtime.processes import init_distributed
from cvdist.tracking import NoTracker
from cvdist.training.run import Run
from cvdist.training.setup import open_run
from cvdist.training.train import train_epoch

BATCH, EPOCHS = 64, 10

_SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


class _Noting(NoTracker):
    """A tracker that keeps the metrics of each step in a list."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.steps.append(dict(values))


class Server:
    """The training runs of this worker."""

    def __init__(self, place: RankInfo, folder: Path) -> None:
        """Begin without loops; `folder` has the caches and the weights."""
        self.place, self.folder = place, folder
        self.runs: dict[str, Run] = {}

    def build(self, name: str, steps: str, dropout: str, kind: str) -> None:
        """Build a loop, without `build_run`, which would refuse made-up features."""
        config = configured(self.folder, self.place.rank, int(steps), float(dropout), kind)
        worker = Worker(self.place, CheckpointStore.at(f"{storage_root(config.run.storage)}/{config.run.name}"))
        self.runs[name] = open_run(config, worker, _Noting())

    def share(self, name: str, other: str) -> None:
        """Let two loops use the same weights and momentum; gradients stay separate."""
        mine, theirs = self.runs[name], self.runs[other]
        parameters = zip(mine.trained.parameters(), theirs.trained.parameters(), strict=True)
        for parameter, whose in parameters:
            parameter.data = whose.data
            mine.optimizer.state[parameter] = theirs.optimizer.state[whose]

    def drop(self, name: str) -> None:
        """Free the memory of a loop."""
        del self.runs[name]

    def run(self, name: str, epoch: str) -> dict[str, Any]:
        """Train an epoch, after all workers are ready."""
        run = self.runs[name]
        assert isinstance(run.tracker, _Noting)
        run.tracker.steps = []
        run.progress.position = 0
        run.progress.loss_sum, run.progress.correct = 0.0, 0
        self._barrier()
        sent, began = int(_SENT.read_text()), time.perf_counter()
        train_epoch(run, int(epoch))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "sent": int(_SENT.read_text()) - sent, "steps": run.tracker.steps}

    def rates(self) -> dict[str, float]:
        """Measure the rates of this worker, for the cost model's `Machine`."""
        run = next(iter(self.runs.values()))
        self._barrier()
        matrix, memory = measure.rates(self.place.device, run.precision)
        found = {"matrix_rate": matrix, "memory_rate": memory}
        if dist.is_initialized():
            self._barrier()
            found["link_rate"], found["latency"] = measure.link(self.place.device)
        return found

    def work(self, name: str) -> dict[str, Any]:
        """Return the sizes of a step, by the run's own cost model."""
        return dataclasses.asdict(self.runs[name].plan.work)

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def configured(folder: Path, node: int, steps: int, dropout: float, kind: str) -> TrainConfig:
    """Return the configuration: training from a cache in float32, with a separate copy for each node."""
    ways = {"parallel": "head"} if kind == "head" else {"parallel": "data", "gradient_compression": kind}
    return configs.replace(
        recipes.find("dogs-cats-vgg16-features"),
        features=str(folder / f"features-{steps}"), cache=str(folder / f"cache-{node}"), batch_size=BATCH,
        weights=str(folder / "weights.pth"), weights_preprocessing="imagenet", precision="float32",
        dropout=dropout, epochs=EPOCHS, log_every_steps=1, tracking="none", name="bench",
        storage=str(folder / "runs"), device="cpu", **ways,
    )  # fmt: skip


def main() -> None:
    """Execute commands until the standard input ends."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr
    with init_distributed(configured(folder, 0, 1, 0.0, "head").runtime) as place:
        server = Server(place, folder)
        for line in sys.stdin:
            command, *words = line.split()
            do: Callable[..., Any] = getattr(server, command)
            print(json.dumps(do(*words)), file=answers, flush=True)


if __name__ == "__main__":
    main()
