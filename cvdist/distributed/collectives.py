"""What the workers of a run tell each other. Everything here works alone, too, without a process group."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from cvdist.errors import UserError

T = TypeVar("T")
_LOST = r"(?i)gloo|nccl|process ?group|connection (closed|reset|refused)|tim(ed out|eout)"


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all workers, in place; every worker calls it equally often."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: T, timeout: float = 0.0) -> list[T]:
    """Each worker's small picklable value, by rank, on every worker.

    timeout: seconds that workers may come apart; 0: as long as in any collective operation.
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


def set_group_timeout(timeout: float) -> None:
    """From now on, wait `timeout` seconds for the other workers: what takes longer at the start is done."""
    if dist.is_initialized():
        dist.set_timeout(timedelta(seconds=timeout))


class LostWorkers(RuntimeError):
    """Another worker has died, hangs, or can't be reached."""


@contextmanager
def annotate_collective_errors(rank: int, epoch: int, step: int) -> Iterator[None]:
    """An error of the process group in the block says which worker waited for the others, and in which step."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not dist.is_initialized() or not re.search(_LOST, text):
            raise
        waited = "waited in vain for" if re.search(r"(?i)tim(ed out|eout)", text) else "lost the connection to"
        raise LostWorkers(
            f"worker {rank} {waited} another worker in step {step} of epoch {epoch} (--step-timeout bounds the "
            f"wait): {text.strip().splitlines()[0][:200]}"
        ) from error


@contextmanager
def raise_on_all_ranks(timeout: float = 0.0) -> Iterator[None]:
    """A `UserError` that one worker raises in the block is raised by all, so that none waits for it in vain.

    timeout: seconds that the others wait for the slowest worker; 0: as long as in any collective operation.
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
