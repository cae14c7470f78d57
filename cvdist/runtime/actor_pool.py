"""Ray Data actors on all GPUs or CPUs of the cluster, one work unit per task.

Ray starts the actors, hands out the units, and gives those of a lost actor or node to another one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import torch

from cvdist import log
from cvdist.errors import UserError
from cvdist.resumable_map import Receipt, ResultStore, WorkUnit
from cvdist.runtime import ray_cluster
from cvdist.runtime.map_workers import OpenFunction
from cvdist.runtime.ray_cluster import ResourceRequest

T = TypeVar("T")

_PAUSE = 5.0  # seconds after which a line shows the progress
# A GPU's actor works on several units at a time: one is computed, others are decoded, uploaded or compressed.
_UNITS_AT_A_TIME = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True)
class Pool:
    """How many actors there may be, and what each has: a GPU or `cpus` cores, and threads that decode."""

    actors: int
    use_gpu: bool
    cpus: int
    decode_threads: int

    def describe(self, units: int) -> str:
        """Say how many actors work on `units` work units, as `2 CPU actors`."""
        count = min(self.actors, units)
        return f"{count} {'GPU' if self.use_gpu else 'CPU'} actor{'s'[: count > 1]}"


def plan(request: ResourceRequest, actors: int, decode_workers: int) -> Pool:
    """Plan the pool of actors for the connected cluster.

    Args:
        request: the least that the actors need.
        actors: how many there may be; 0: as many as there is room for.
        decode_workers: number of threads of each actor that decode pictures; 0: one per core.

    Raises:
        UserError: if the cluster is too small.
    """
    use_gpu = ray_cluster.require_resources(request) and request.device != "cpu"
    have = ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    each = request.cluster.cpus_per_worker
    room = max(1, gpus if use_gpu else cpus // each)
    # A GPU's actor computes nothing on the cores, so its share of them can decode.
    threads = decode_workers or (max(1, cpus // max(gpus, 1)) if use_gpu else each)
    return Pool(actors or room, use_gpu, each, threads)


def run(
    pool: Pool, open_function: OpenFunction, units: Sequence[WorkUnit], store: ResultStore
) -> Iterator[Receipt | None]:
    """Process work units by actors, in any order; yields None now and then.

    Raises:
        UserError: for an error that an actor returns.
    """
    for noisy in ("progress", "execution.streaming_executor"):  # the job has its own words for these
        logging.getLogger(f"ray.data._internal.{noisy}").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    at_a_time = _UNITS_AT_A_TIME["cuda" if pool.use_gpu else "cpu"]
    # A block for each unit: a block is what Ray hands to an actor, and what it repeats.
    rows = [{"unit": json.dumps(dataclasses.asdict(unit))} for unit in units]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_kwargs={
            # As bytes, which keep the object for as long as this process lives: Ray may start actors again.
            "opening": ray.cloudpickle.dumps(ray.put((open_function, store))),
            "use_gpu": pool.use_gpu,
            "decode_threads": pool.decode_threads,
        },
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=min(pool.actors, len(rows)),
            max_tasks_in_flight_per_actor=2 * at_a_time,
            max_concurrent_calls_per_actor=at_a_time,
            enable_true_multi_threading=at_a_time > 1,
        ),
        num_cpus=pool.cpus,
        num_gpus=1 if pool.use_gpu else 0,
    )
    for row in _with_pauses(results.iter_rows(), _PAUSE):
        if row is None:
            yield None
        elif row["error"]:
            raise UserError(row["error"])
        else:
            yield Receipt.from_json(row["receipt"])


class _Actor:
    """Applies the function in a process of Ray. Errors that the user can correct come back as rows."""

    def __init__(self, opening: bytes, use_gpu: bool, decode_threads: int) -> None:
        log.setup()
        # Ray has set PyTorch's number of threads to the cores of this actor.
        device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
        self._function, self._error = None, ""
        try:
            open_function, self._store = ray.get(ray.cloudpickle.loads(opening))
            self._function = open_function(device, decode_threads=decode_threads)
        except UserError as error:
            self._error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        content, error = b"", self._error
        if self._function is not None:
            try:
                unit = WorkUnit(**json.loads(batch["unit"][0]))
                content = self._store.process(self._function, unit).to_json()
            except UserError as caught:
                error = str(caught)
        return {"receipt": [content], "error": [error]}


def _with_pauses(items: Iterable[T], seconds: float) -> Iterator[T | None]:
    """Yield `items` as they come, and None whenever no item has come for `seconds`."""
    arrived: queue.Queue[tuple[str, Any]] = queue.Queue()

    def take() -> None:
        try:
            for item in items:
                arrived.put(("item", item))
            arrived.put(("end", None))
        except BaseException as error:  # for the other thread to raise
            arrived.put(("error", error))

    threading.Thread(target=take, name="results", daemon=True).start()
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
