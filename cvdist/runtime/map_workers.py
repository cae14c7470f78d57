"""Choose what computes the work units of a map: this process, or actors on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cvdist.config import ActorsConfig, Device
from cvdist.distributed import device as devices
from cvdist.resumable_map import Compute, MapPlan, Receipt, ResultStore, WorkUnit

logger = logging.getLogger(__name__)

OpenFunction = Callable[..., Any]
"""Called as f(device, decode_threads=N) in the process that computes; 0 threads mean one per core.
Returns a function from `WorkUnit` to `UnitResult`, with an attribute `precision`."""


def open_workers(
    plan: MapPlan,
    open_function: OpenFunction,
    runtime: ActorsConfig,
    *,
    device: Device,
    actors: int,
    flag: str,
    decode_workers: int,
    verb: str,
) -> Compute:
    """Connect to the cluster if there is work for it, and return the function that computes work units.

    Args:
        plan: the work units.
        open_function: what is done with each unit.
        runtime: whether this process or a cluster does it.
        device: device of each process.
        actors: number of actors; 0: as many as there is room for.
        flag: the flag that `actors` comes from, for messages.
        decode_workers: threads of each process that decode pictures; 0: one per core.
        verb: what the actors do, for the log, such as "extracting".

    Raises:
        UserError: if there is no such cluster, or it is too small.
    """
    if runtime.launcher == "inline" or not plan.left:  # nothing left to compute needs no cluster

        def here(units: Sequence[WorkUnit], store: ResultStore) -> Iterator[Receipt]:
            where = devices.here(device)
            function = open_function(where, decode_threads=decode_workers)
            logger.info("%s on %s in this process, %s", verb, where, function.precision.name)
            for unit in units:
                yield store.process(function, unit)

        return here

    from cvdist.runtime import actor_pool, ray_cluster

    # One actor is enough to begin with: Ray's autoscaler may bring more.
    request = ray_cluster.ResourceRequest(actors or 1, device, runtime, flag)
    ray_cluster.connect(request)
    pool = actor_pool.plan(request, actors, decode_workers)

    def by_actors(units: Sequence[WorkUnit], store: ResultStore) -> Iterator[Receipt | None]:
        logger.info("%s on %s", verb, pool.describe(len(units)))
        return actor_pool.run(pool, open_function, units, store)

    return by_actors
