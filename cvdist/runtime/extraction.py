"""Extraction by Ray Data: actors on all GPUs or CPUs of the cluster, one shard a task.

Ray starts the actors, hands out the shards, and gives those of a lost actor or node to another one.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import torch

from cvdist import config as configs
from cvdist import log
from cvdist.config import TrainConfig
from cvdist.errors import UserError
from cvdist.features import build, receipt
from cvdist.features.build import Built
from cvdist.features.extract import Extractor
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.plan import Slice
from cvdist.features.receipt import Receipt
from cvdist.runtime import ray_cluster

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE = 5.0  # seconds after which a line says how far the work is
# A GPU's actor works on two shards at a time: one is computed, the other one decoded or uploaded.
_SHARDS_AT_A_TIME = {"cpu": 1, "cuda": 2}


def extract(config: TrainConfig) -> Built:
    """Make or update the cache at `--features` on the Ray cluster.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
    """
    # One actor is enough to begin with: Ray's autoscaler may bring more.
    needed = configs.replace(config, workers=config.features.extractors or 1)
    with ThreadPoolExecutor(1) as pool:
        planning = pool.submit(build.make_plan, config)
        ray_cluster.connect(needed)
        plan = planning.result()
    use_gpu = ray_cluster.require_resources(needed) and config.runtime.device != "cpu"
    count = config.features.extractors or _room(config, use_gpu)

    def compute(left: Sequence[Slice]) -> Iterator[Receipt | None]:
        actors = min(count, len(left))
        logger.info("extracting on %d %s", actors, f"{'GPU' if use_gpu else 'CPU'} actor{'s'[: actors > 1]}")
        return _run(config, plan.fingerprint, left, actors, use_gpu)

    return build.build(config, plan, compute)


def _room(config: TrainConfig, use_gpu: bool) -> int:
    have = ray.cluster_resources()
    if use_gpu:
        return max(1, int(have.get("GPU", 0)))
    return max(1, int(have.get("CPU", 0)) // config.runtime.cpus_per_worker)


def _cores_each(config: TrainConfig, use_gpu: bool) -> int:
    """Cores that decode for one actor: its own, or a GPU's share of all, which compute nothing else."""
    have = ray.cluster_resources()
    if not use_gpu:
        return config.runtime.cpus_per_worker
    return max(1, int(have.get("CPU", 1) // max(have.get("GPU", 1), 1)))


def _run(
    config: TrainConfig, fingerprint: Fingerprint, left: Sequence[Slice], actors: int, use_gpu: bool
) -> Iterator[Receipt | None]:
    for noisy in ("progress", "execution.streaming_executor"):  # the job has its own words for these
        logging.getLogger(f"ray.data._internal.{noisy}").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    at_a_time = _SHARDS_AT_A_TIME["cuda" if use_gpu else "cpu"]
    # A block for each shard: a block is what Ray hands to an actor, and what it repeats.
    shards = ray.data.from_items([{"slice": work.to_dict()} for work in left], override_num_blocks=len(left))
    receipts = shards.map_batches(
        _Actor,
        fn_constructor_kwargs={
            "config": configs.to_dict(config),
            "fingerprint": fingerprint.to_dict(),
            "use_gpu": use_gpu,
            "decode_threads": config.data.decode_workers or _cores_each(config, use_gpu),
        },
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=2 * at_a_time,
            max_concurrent_calls_per_actor=at_a_time,
            enable_true_multi_threading=at_a_time > 1,
        ),
        num_cpus=config.runtime.cpus_per_worker,
        num_gpus=1 if use_gpu else 0,
    )
    for row in _with_pauses(receipts.iter_rows(), _PAUSE):
        if row is None:
            yield None
        elif row["error"]:
            raise UserError(row["error"])
        else:
            yield receipt.require(bytes(row["receipt"]))


def _with_pauses(items: Iterable[T], seconds: float) -> Iterator[T | None]:
    """`items` as they come, and None whenever none has come for `seconds`."""
    arrived: queue.Queue[tuple[str, Any]] = queue.Queue()

    def take() -> None:
        try:
            for item in items:
                arrived.put(("item", item))
            arrived.put(("end", None))
        except BaseException as error:  # for the other thread to raise
            arrived.put(("error", error))

    threading.Thread(target=take, name="receipts", daemon=True).start()
    while True:
        try:
            kind, value = arrived.get(timeout=seconds)
        except queue.Empty:
            yield None
            continue
        if kind == "end":
            return
        if kind == "error":
            raise value
        yield value


class _Actor:
    """An extractor in a process of Ray's. What the user can mend comes back as a row: no retry would help."""

    def __init__(
        self, config: dict[str, Any], fingerprint: dict[str, Any], use_gpu: bool, decode_threads: int
    ) -> None:
        log.setup()
        chosen = configs.from_dict(config)
        # How many threads PyTorch computes with, Ray has set by the cores of this actor.
        device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
        self._extractor, self._error = None, ""
        try:
            self._extractor = Extractor(
                chosen, Fingerprint.from_dict(fingerprint), device, decode_threads=decode_threads
            )
        except UserError as error:
            self._error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        (work,) = batch["slice"]
        content, error = b"", self._error
        if self._extractor is not None:
            try:
                content = receipt.dump(self._extractor(Slice.from_dict(work)))
            except UserError as caught:
                error = str(caught)
        return {"receipt": [content], "error": [error]}
