"""Exchanges between the workers of a run. Every function also works alone, without a process group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from cvdist.errors import UserError

T = TypeVar("T")
_LOST = r"(?i)gloo|nccl|process ?group|connection (closed|reset|refused)|tim(ed out|eout)"


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all workers, in place, and return it. All workers must call it equally often."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Copy rank 0's `tensor` to all workers, in place, and return it. All workers must call this."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


def gather(value: T, timeout: float = 0.0) -> list[T]:
    """Return the values that all workers passed, in the order of their ranks, on every worker.

    Args:
        value: This worker's value. It is pickled, so it should be small.
        timeout: Seconds that workers may arrive apart. 0: as long as in any other collective operation.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    if timeout:
        group = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        dist.all_gather_object(values, value, group=group)
        dist.destroy_process_group(group)
    else:
        dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_rank_zero(make: Callable[[], T]) -> T:
    """Return what `make` returns on rank 0, which alone calls it, on every worker. It is pickled."""
    alone = not dist.is_initialized()
    return gather(make() if alone or dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]


def set_group_timeout(timeout: float) -> None:
    """Let later collective operations wait up to `timeout` seconds for the other workers."""
    if dist.is_initialized():
        dist.set_timeout(timedelta(seconds=timeout))


class LostWorkers(RuntimeError):
    """Raised if another worker has died, hangs, or can't be reached."""


@contextmanager
def annotate_collective_errors(rank: int, epoch: int, step: int) -> Iterator[None]:
    """Turn an error of the process group in the block into one that says which worker waited in which step.

    Args:
        rank: This worker's rank.
        epoch: The current epoch, counted from 1.
        step: The current step of the epoch, counted from 1.

    Raises:
        LostWorkers: If the block fails because another worker did not take part in a collective operation.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not dist.is_initialized() or not re.search(_LOST, text):
            raise
        timed_out = re.search(r"(?i)tim(ed out|eout)", text)
        what = "timed out waiting for" if timed_out else "lost the connection to"
        raise LostWorkers(
            f"worker {rank} {what} another worker in step {step} of epoch {epoch} (--step-timeout bounds the "
            f"wait): {text.strip().splitlines()[0][:200]}"
        ) from error


@contextmanager
def raise_on_all_ranks(timeout: float = 0.0) -> Iterator[None]:
    """Raise a `UserError` that one worker raises in the block on all workers, so that none waits for it.

    All workers must enter the block.

    Args:
        timeout: Seconds that the others wait for the slowest worker. 0: as long as in any other collective
            operation.

    Raises:
        UserError: On all workers, the error of the lowest rank that failed.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    found = [one for one in gather((str(error), error.transient) if error else None, timeout) if one]
    if found:
        message, transient = found[0]
        raise UserError(message, on_all_workers=True, transient=transient) from error
