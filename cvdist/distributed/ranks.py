"""A process's place among the processes that train one model together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class RankInfo:
    """Ranks of one process. The defaults are those of a process that trains alone, on the CPU.

    Attributes:
        rank: Number of this process among all, from 0.
        world_size: Number of processes.
        local_rank: Number of this process among those of its node, from 0.
        local_world_size: Number of processes on its node.
        node: Name of the node in metrics.
        device: Device that this process computes on.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: str = "localhost"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
