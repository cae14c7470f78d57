"""The Ray cluster that a job runs on: reaching it, or starting one, and whether it is large enough.

Does not import torch: that takes seconds, in which Ray's processes can start.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any

import ray

from cvdist.config import TrainConfig
from cvdist.errors import UserError

logger = logging.getLogger(__name__)


def connect(config: TrainConfig, flag: str = "--workers") -> int:
    """Join the cluster of RAY_ADDRESS or of the submitted job, or start Ray on this machine.

    Returns the number of the cluster's nodes. flag: the setting that the number of workers came from.

    Raises:
        UserError: if there is no cluster at RAY_ADDRESS, or it is too small for the configuration.
    """
    _join(config)
    require_resources(config, flag)
    return sum(node["Alive"] for node in ray.nodes())


def reconnect(config: TrainConfig) -> None:
    """Join the cluster as a new job; Ray ends whatever is left of the old one, and frees what that holds.

    Raises:
        UserError: if the cluster is gone.
    """
    ray.shutdown()
    _join(config)


def _join(config: TrainConfig) -> None:
    def know_own_cluster() -> None:  # nested, so that it is pickled whole: workers can't import this module yet
        import os

        import ray

        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)

    options: dict[str, Any] = {
        "log_to_driver": True,
        "logging_level": logging.WARNING,
        # Ray Train's PlacementGroupCleaner asks the cluster whether training goes on. Without an address it
        # takes the machine's newest, which may be another one, knows of no training, and has this one ended.
        "runtime_env": {"worker_process_setup_hook": know_own_cluster},
    }
    address = os.environ.get("RAY_ADDRESS")
    try:
        if ray.is_initialized():
            pass  # a part of a job that has connected
        elif address:
            _require_listener(address, config.runtime.connect_timeout)
            ray.init(address=address, **options)
        else:
            # Ray Train asks the dashboard's state API whether its controller lives; without one it complains.
            ray.init(address="local", include_dashboard=True, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"could not connect to {where}: {first}") from error


def require_resources(config: TrainConfig, flag: str = "--workers") -> bool:
    """Whether the workers use GPUs; waits `--resource-timeout` seconds for an autoscaler to bring what lacks.

    Raises:
        UserError: if the cluster has too few CPUs or GPUs, saying how many it has.
    """
    runtime = config.runtime
    fewest, _ = runtime.worker_range
    deadline = time.monotonic() + runtime.resource_timeout
    while True:
        have = ray.cluster_resources()
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        use_gpu = runtime.device == "cuda" or (runtime.device == "auto" and gpus >= fewest)
        lacking = _lacking(config, cpus, gpus, use_gpu, flag)
        if not lacking:
            return use_gpu
        if time.monotonic() >= deadline:
            raise UserError(lacking)
        logger.info("waiting for nodes: %s", lacking)
        ray.autoscaler.sdk.request_resources(  # a no-op where nothing scales
            bundles=[{"CPU": runtime.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}] * fewest
        )
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def _require_listener(address: str, timeout: float) -> None:
    """Ray itself would try for minutes to reach a cluster that is not there.

    Raises:
        UserError: naming the address and the setting.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`, `local`: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} within {timeout:g} s (--connect-timeout): "
            f"{error.strerror or error}. Correct it, or unset it to use this machine alone"
        ) from error


def _lacking(config: TrainConfig, cpus: float, gpus: float, use_gpu: bool, flag: str) -> str:
    """What the cluster has too little of, as one line; empty if it is large enough."""
    runtime = config.runtime
    fewest, _ = runtime.worker_range
    nodes = sum(node["Alive"] for node in ray.nodes())
    has = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {nodes} node{'s' if nodes != 1 else ''}"
    if use_gpu and gpus < fewest:
        return (
            f"{flag} {runtime.workers} --device cuda needs {fewest} GPUs, {has}: "
            f"lower {flag}, or set --resource-timeout to wait for an autoscaler"
        )
    needed = fewest * runtime.cpus_per_worker
    if cpus < needed:
        return (
            f"{flag} {runtime.workers} with --cpus-per-worker {runtime.cpus_per_worker} needs {needed} "
            f"CPUs, {has}: lower {flag}, or set --resource-timeout to wait for an autoscaler"
        )
    return ""
