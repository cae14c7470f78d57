"""`torch.compile`, and CUDA graphs through it.

A CUDA graph replays a recorded sequence of kernels, on the same memory each time: small networks, whose kernels
take less time than their launches, gain most. What a replay has written is overwritten by the next one. So each
step says where it begins, gradients are dropped at its end (`zero_grad(set_to_none=True)`) and are not summed
over portions of a batch (`cvdist.config.check`); losses, which outlive their step, are computed outside.
"""

from __future__ import annotations

import torch
from torch import nn

from cvdist.config import CUDA_GRAPHS, Compile


def compile_parts(mode: Compile, *parts: nn.Module | None) -> None:
    """Let each part's calls go through `torch.compile`, in place; nothing is compiled before the first call."""
    for part in parts:
        if part is not None and mode != "none":
            part.compile(mode=mode)


def begin_step(mode: Compile) -> None:
    """What the last step's graphs have written may be overwritten from here on."""
    if mode in CUDA_GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()
