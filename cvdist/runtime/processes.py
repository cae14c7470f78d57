"""Workers started by torchrun, or this process alone: no Ray needed."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cvdist.config import RuntimeConfig
from cvdist.distributed.ranks import RankInfo
from cvdist.errors import UserError


@contextmanager
def init_distributed(runtime: RuntimeConfig) -> Iterator[RankInfo]:
    """Join the process group that torchrun's environment describes, if there is one, and leave it at the end.

    The launcher `inline` is one process, whatever the environment says.

    Raises:
        UserError: If GPUs are asked for that are not there.
    """
    told = {} if runtime.launcher == "inline" else os.environ
    rank, world_size = int(told.get("RANK", 0)), int(told.get("WORLD_SIZE", 1))
    local_rank, on_node = int(told.get("LOCAL_RANK", 0)), int(told.get("LOCAL_WORLD_SIZE", 1))
    device = _device(runtime, local_rank, on_node)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if world_size > 1:
            timeout = timedelta(seconds=runtime.collective_timeout)
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
            store.set_timeout(timeout)
            require_same_devices(store, rank, world_size, device.type)
            dist.init_process_group(
                backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timeout,
                store=PrefixStore("cvdist", store),
                rank=rank,
                world_size=world_size,
                device_id=device if device.type == "cuda" else None,
            )
        yield RankInfo(rank, world_size, local_rank, on_node, socket.gethostname(), device)
    except UserError as error:
        error.told_by_another = error.on_all_workers and rank > 0
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def require_same_devices(store: Store, rank: int, world_size: int, kind: str) -> None:
    """Refuse a group in which only some workers have GPUs: these have no way to exchange tensors with others.

    Args:
        store: Store through which the workers tell each other their devices.
        rank: Rank of this worker.
        world_size: The number of workers.
        kind: Type of this worker's device, `cpu` or `cuda`.

    Raises:
        UserError: On all workers.
    """
    store.set(f"device-{rank}", kind)
    kinds = [store.get(f"device-{other}").decode() for other in range(world_size)]
    if len(set(kinds)) > 1:
        counts = " and ".join(f"{count} on {name}" for name, count in Counter(kinds).items())
        raise UserError(
            f"the workers have different devices, {counts}: use nodes of one kind, or --device cpu",
            on_all_workers=True,
        )


def _device(runtime: RuntimeConfig, local_rank: int, needed: int) -> torch.device:
    have = torch.cuda.device_count()
    if runtime.device == "cuda" and have < needed:
        raise UserError(f"--device cuda: {needed} workers on this node, which has {have} GPUs")
    if runtime.device != "cpu" and have >= needed:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
