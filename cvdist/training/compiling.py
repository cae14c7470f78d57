"""`torch.compile`, with and without CUDA graphs.

A CUDA graph replays a recorded sequence of kernels on the same memory each time. Small networks, whose kernels
take less time than their launches, gain most from it. Each replay overwrites the results of the one before. So
each step has to say where it begins, gradients are dropped at its end (`zero_grad(set_to_none=True)`) and are
not accumulated over micro-batches (`cvdist.config.check` refuses that), and losses, which are needed after
their step, are computed outside of the graphs.
"""

from __future__ import annotations

import torch
from torch import nn

from cvdist.config import CUDA_GRAPHS, Compile


def compile_modules(mode: Compile, *modules: nn.Module | None) -> None:
    """Compile each of `modules`, in place. The compilation itself happens in the first call of each module."""
    for module in modules:
        if module is not None and mode != "none":
            module.compile(mode=mode)


def begin_step(mode: Compile) -> None:
    """Allow CUDA graphs to overwrite the results of the last step from now on."""
    if mode in CUDA_GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()
