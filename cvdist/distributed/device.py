"""A worker's device: its name, the memory it has used, and the state of its random number generators."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from cvdist.errors import UserError


def here(wanted: str) -> torch.device:
    """Return the device of a process that computes alone; `wanted` is `auto`, `cpu` or `cuda`.

    Raises:
        UserError: if a GPU is asked for that is not there.
    """
    have = torch.cuda.is_available()
    if wanted == "cuda" and not have:
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use")
    return torch.device("cuda", 0) if have and wanted != "cpu" else torch.device("cpu")


def describe(device: torch.device) -> str:
    """Return the device's name, such as `NVIDIA H100 80GB HBM3` or `AMD EPYC, 2 cores`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had on the GPU, or in main memory if it computes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the random number generators that dropout draws from, as uint8 tensors.

    The key `cpu` is always there; `cuda` is there if the device is a GPU.
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the random number generators to what `random_state` returned.

    A state from another kind of device sets only the generators that both kinds have.
    """
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def be_deterministic(device: torch.device) -> None:
    """Let this process use only operations that give the same bits each time. CPUs have no others here."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # Nothing reads memory that nothing wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
