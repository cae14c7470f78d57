"""A worker of `benchmarks/scaling.py`: does what its standard input says; not a benchmark itself.

    build NAME STEPS DROPOUT KIND   a training loop on the cache of STEPS batches; KIND: head, or how gradients
                                    are averaged: none, bf16, powersgd
    share NAME OTHER                let two data-parallel loops have the same weights and momentum, for memory
    drop NAME
    run NAME EPOCH                  an epoch: seconds, bytes that have left the node, the metrics of each step
    rates                           what this worker can do while the others do the same
    work NAME                       the sizes that its cost model has

Each is answered by one line of JSON.
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
    """Keeps the metrics of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.steps.append(dict(values))


class Server:
    """The training runs of this worker."""

    def __init__(self, place: RankInfo, folder: Path) -> None:
        """`folder`: where the caches are."""
        self.place, self.folder = place, folder
        self.runs: dict[str, Run] = {}

    def build(self, name: str, steps: str, dropout: str, kind: str) -> None:
        """Without `build_run`, which would refuse features that are made up."""
        config = configured(self.folder, self.place.rank, int(steps), float(dropout), kind)
        worker = Worker(self.place, CheckpointStore.at(f"{storage_root(config.run.storage)}/{config.run.name}"))
        self.runs[name] = open_run(config, worker, _Noting())

    def share(self, name: str, other: str) -> None:
        """Their gradients remain their own."""
        mine, theirs = self.runs[name], self.runs[other]
        parameters = zip(mine.trained.parameters(), theirs.trained.parameters(), strict=True)
        for parameter, whose in parameters:
            parameter.data = whose.data
            mine.optimizer.state[parameter] = theirs.optimizer.state[whose]

    def drop(self, name: str) -> None:
        """Free its memory."""
        del self.runs[name]

    def run(self, name: str, epoch: str) -> dict[str, Any]:
        """All workers begin together."""
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
        """As the cost model's `Machine` has them."""
        run = next(iter(self.runs.values()))
        self._barrier()
        matrix, memory = measure.rates(self.place.device, run.precision)
        found = {"matrix_rate": matrix, "memory_rate": memory}
        if dist.is_initialized():
            self._barrier()
            found["link_rate"], found["latency"] = measure.link(self.place.device)
        return found

    def work(self, name: str) -> dict[str, Any]:
        """The sizes of a step, by the run's own cost model."""
        return dataclasses.asdict(self.runs[name].plan.work)

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def configured(folder: Path, node: int, steps: int, dropout: float, kind: str) -> TrainConfig:
    """Of the recipe from a cache, in float32; each node has a copy of its own."""
    ways = {"parallel": "head"} if kind == "head" else {"parallel": "data", "gradient_compression": kind}
    return configs.replace(
        recipes.find("dogs-cats-vgg16-features"),
        features=str(folder / f"features-{steps}"), cache=str(folder / f"cache-{node}"), batch_size=BATCH,
        weights=str(folder / "weights.pth"), weights_preprocessing="imagenet", precision="float32",
        dropout=dropout, epochs=EPOCHS, log_every_steps=1, tracking="none", name="bench",
        storage=str(folder / "runs"), device="cpu", **ways,
    )  # fmt: skip


def main() -> None:
    """Until the input ends."""
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
