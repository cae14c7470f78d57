"""What the workers of a run tell each other. Everything here works alone, too, without a process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from cvdist.errors import UserError

T = TypeVar("T")


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


@contextmanager
def together(timeout: float = 0.0) -> Iterator[None]:
    """A `UserError` that one worker raises in the block is raised by all, so that none waits for it in vain.

    timeout: seconds that the others wait for the slowest worker; 0: as long as in any collective operation.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    messages = [message for message in gather(str(error) if error else None, timeout) if message]
    if messages:
        raise UserError(messages[0], on_all_workers=True) from error
