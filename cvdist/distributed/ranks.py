"""A process's place among the processes that train one model together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class RankInfo:
    """Ranks of one process. The defaults are those of a process that trains alone, on the CPU.

    Attributes:
        rank: Of this process among all, from 0.
        world_size: The number of processes.
        local_rank: Of this process among those of its node, from 0.
        local_world_size: The number of processes on its node.
        node: The node's name in metrics.
        device: What this process computes on.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: str = "localhost"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
