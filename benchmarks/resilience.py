"""Costs of resilience for a run that is not disturbed: its checks in each step, and its checkpoints.

One process, one thread, the CNN for digits. The other side of the first comparison is the same loop without the
watch over losses and the exchange about signals; that of the second one writes no checkpoints. One checkpoint
of 0.9 MB comes every four epochs, which take two to three seconds. Both costs are smaller than the noise of a
single pair, so there are several.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Comparison, compare
from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints.fence import Fence
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import TrainConfig
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.stop_request import StopRequest
from cvdist.tracking import NoTracker
from cvdist.training.setup import build_run
from cvdist.training.train import train_epoch

PAIRS = 25


def measure() -> Iterator[Comparison]:
    """Measure the seconds of an epoch."""
    torch.set_num_threads(1)
    config = configs.replace(recipes.find("digits-cnn"), name="bench", batch_size=32, tracking="none")
    with tempfile.TemporaryDirectory() as folder:
        with_all = _epoch(config, Path(folder) / "a")
        yield compare(
            "resilience: checks in each step / none",
            with_all,
            _epoch(config, Path(folder) / "b", bare=True),
            unit="s/epoch",
            target=1.01,
            pairs=PAIRS,
            at_most=True,
        )
        saving = configs.replace(config, checkpoint_every=60)
        yield compare(
            "resilience: asynchronous checkpoints / none",
            _epoch(saving, Path(folder) / "c", epochs=4),
            _epoch(config, Path(folder) / "d", epochs=4),
            unit="s/4 epochs",
            target=1.02,
            pairs=PAIRS,
            at_most=True,
        )


def _epoch(config: TrainConfig, folder: Path, *, epochs: int = 1, bare: bool = False) -> Callable[[], float]:
    fence = Fence.claim_job(str(folder)).claim_attempt()
    worker = Worker(RankInfo(), CheckpointStore(fence.folder, 1, fence), config.checkpoint)
    run = build_run(config, worker, NoTracker())
    without_more = configs.replace(config, checkpoint_every=0)
    if bare:
        worker.poll_stop_request = lambda: StopRequest.NONE  # type: ignore[method-assign]
        run.losses = _NoWatch()  # type: ignore[assignment]

    def timed() -> float:
        started = time.perf_counter()
        for epoch in range(epochs):
            run.progress.position = 0
            run.config = without_more if epoch else config
            train_epoch(run, epoch + 1)
        seconds = time.perf_counter() - started
        worker.wait_for_uploads()
        return seconds

    return timed


class _NoWatch:
    """Stands in for the check of losses, and does nothing."""

    def add(self, *_: Any) -> None:
        """Ignore the loss."""

    def require_finite(self, *_: Any) -> None:
        """Check nothing."""
