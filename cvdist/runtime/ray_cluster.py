"""Join or start the Ray cluster that a job runs on, and check that it is large enough.

Does not import torch: that takes seconds, in which Ray's processes can start.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cvdist import log, proxy
from cvdist.config import ClusterConfig, Device, RuntimeConfig
from cvdist.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResourceRequest:
    """The least that a job needs of a cluster.

    Args:
        count: the least number of processes.
        device: whether each process needs a GPU.
        cluster: the CPU cores of each process, and how long the job waits for the cluster.
        flag: the setting that `count` comes from.
        value: what the user gave that setting; empty: `count`.
    """

    count: int
    device: Device
    cluster: ClusterConfig
    flag: str
    value: str = ""

    @classmethod
    def of_workers(cls, runtime: RuntimeConfig) -> ResourceRequest:
        """Build the request for the workers of a training."""
        fewest, _ = runtime.worker_range
        return cls(fewest, runtime.device, runtime, "--num-workers", str(runtime.num_workers))

    def __str__(self) -> str:
        """Format the setting that the request comes from, as `--num-workers 2:8`."""
        return f"{self.flag} {self.value or self.count}"


def address() -> str:
    """Return the address of the cluster to join, from RAY_ADDRESS; empty: Ray is started on this machine."""
    named = os.environ.get("RAY_ADDRESS", "")
    return "" if named == "local" else named


def connect(request: ResourceRequest) -> int:
    """Join the cluster of RAY_ADDRESS or of the submitted job, or start Ray on this machine.

    Returns the number of the cluster's nodes.

    Raises:
        UserError: if there is no cluster at RAY_ADDRESS, or it is too small for the request.
    """
    _join(request.cluster.connect_timeout)
    require_resources(request)
    return sum(node["Alive"] for node in ray.nodes())


def reconnect(timeout: float) -> None:
    """Join the cluster as a new job. Ray ends what is left of the old job, and frees the resources it holds.

    Args:
        timeout: seconds that the cluster may take to answer.

    Raises:
        UserError: if the cluster is gone.
    """
    ray.shutdown()
    _join(timeout)


def _join(timeout: float) -> None:
    ask_directly = proxy.ask_directly

    def know_own_cluster() -> None:  # nested, so that it is pickled whole: workers can't import this module yet
        import os

        import ray

        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        ask_directly(node["NodeManagerAddress"] for node in ray.nodes())

    cluster = address()
    direct = proxy.ask_directly([cluster.rpartition("://")[2].rpartition(":")[0]] if cluster else [])
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    passed = direct | ({log.RELAYED: "1"} if os.environ.get(log.RELAYED) else {})
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if cluster:
        # Ray Train's PlacementGroupCleaner asks the cluster whether training goes on. Without an address it
        # takes the machine's newest, which may be another one, knows of no training, and has this one ended.
        options["runtime_env"] = {
            "worker_process_setup_hook": know_own_cluster,
            # Workers ask the head before their hook runs. Ray refuses what `ray job submit` has set as well.
            "env_vars": {k: v for k, v in passed.items() if k not in submitted.get("env_vars", {})},
        }
    # Pickled by its content, for the same reason.
    ray.cloudpickle.register_pickle_by_value(proxy)
    try:
        if ray.is_initialized():
            pass  # this is a part of a job that has connected already
        elif cluster:
            _require_listener(cluster, timeout)
            ray.init(address=cluster, **options)
        else:
            # Ray's processes have the environment of this one. The dashboard would add eleven processes that
            # take seconds to import, and nobody looks at the dashboard of a single job.
            ray.init(address="local", include_dashboard=False, **options)
        proxy.ask_directly(node["NodeManagerAddress"] for node in ray.nodes())
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={cluster}" if cluster else "a local Ray"
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"could not connect to {where}: {first}") from error
    finally:
        ray.cloudpickle.unregister_pickle_by_value(proxy)


def require_resources(request: ResourceRequest) -> bool:
    """Return whether the processes use GPUs. Waits `--resource-timeout` seconds for missing CPUs and GPUs.

    Raises:
        UserError: if the cluster has too few CPUs or GPUs, saying how many it has.
    """
    each = request.cluster.cpus_per_worker
    deadline = time.monotonic() + request.cluster.resource_timeout
    demand = None
    try:
        while True:
            have = ray.cluster_resources()
            cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
            use_gpu = request.device == "cuda" or (request.device == "auto" and gpus >= request.count)
            lacking = _lacking(request, cpus, gpus, use_gpu)
            if not lacking:
                return use_gpu
            if time.monotonic() >= deadline:
                raise UserError(lacking)
            logger.info("waiting for nodes: %s", lacking)
            # Ray's `request_resources` would remain when this job is over; a placement group ends with its job,
            # however that ends. Where nothing scales, nobody notices it.
            bundle = {"CPU": float(each), **({"GPU": 1.0} if use_gpu else {})}
            demand = demand or placement_group([bundle] * request.count)
            time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))
    finally:
        if demand is not None:
            remove_placement_group(demand)


def _require_listener(cluster: str, timeout: float) -> None:
    """Refuse an address at which nothing listens: Ray would try for minutes to reach it.

    Raises:
        UserError: naming the address and the setting.
    """
    host, _, port = cluster.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={cluster} within {timeout:g} s (--connect-timeout): "
            f"{error.strerror or error}. Correct it, or unset it to use this machine alone"
        ) from error


def _lacking(request: ResourceRequest, cpus: float, gpus: float, use_gpu: bool) -> str:
    """Say in one line what the cluster has too little of; empty if it is large enough."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    has = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {nodes} node{'s' if nodes != 1 else ''}"
    if use_gpu and gpus < request.count:
        return (
            f"{request} --device cuda needs {request.count} GPUs, {has}: "
            f"lower {request.flag}, or set --resource-timeout to wait for an autoscaler"
        )
    each = request.cluster.cpus_per_worker
    if cpus < request.count * each:
        return (
            f"{request} with --cpus-per-worker {each} needs {request.count * each} "
            f"CPUs, {has}: lower {request.flag}, or set --resource-timeout to wait for an autoscaler"
        )
    return ""
