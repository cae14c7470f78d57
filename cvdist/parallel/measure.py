"""Measures the rates of this machine and of the link to other workers, each in a fraction of a second."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cvdist.distributed.precision import Precision
from cvdist.distributed.traffic import ring_bytes

_SIDE = 1024  # of the matrices that are multiplied on a CPU; a GPU needs larger ones to show its rate
_GPU_SIDE = 8192
_COPIED = 1 << 26  # bytes, more than caches hold
_GPU_COPIED = 1 << 28
_SMALL, _LARGE = 256, 1 << 20  # float32 values that are all-reduced
_SLOW = 0.5  # seconds: if the large all-reduce takes this long, one measurement is precise enough
_REPEATS = 3


@functools.cache
def rates(device: torch.device, precision: Precision) -> tuple[float, float]:
    """Return the FLOP/s of matrix products in this precision, and the bytes/s of memory, read and written.

    A process measures them once, also if it trains several times.
    """
    cuda = device.type == "cuda"
    side, size = (_GPU_SIDE, _GPU_COPIED) if cuda else (_SIDE, _COPIED)
    dtype = precision.half or torch.float32
    a, b = (
        torch.ones(side, side, dtype=dtype, device=device),
        torch.ones(side, side, dtype=dtype, device=device),
    )
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    multiply = _seconds(lambda: torch.mm(a, b), device)
    move = _seconds(lambda: target.copy_(source), device)
    return 2 * side**3 / multiply, 2 * size / move


def link(device: torch.device) -> tuple[float, float]:
    """Return the bytes/s that a worker sends in an all-reduce, and the seconds of the smallest all-reduce.

    All workers must call this; all get the figures that rank 0 measured.
    """
    small, large = torch.zeros(_SMALL, device=device), torch.zeros(_LARGE, device=device)
    latency = _seconds(lambda: dist.all_reduce(small), device)
    seconds = _seconds(lambda: dist.all_reduce(large), device, enough=_SLOW)
    rate = ring_bytes(large.nbytes, dist.get_world_size()) / max(seconds - latency, 1e-9)
    found = torch.tensor([rate, latency], dtype=torch.float64, device=device)
    dist.broadcast(found, src=0)
    return found[0].item(), found[1].item()


def flops(module: nn.Module, shape: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Return the FLOP of one picture's forward and backward pass, and the shape of its output.

    Nothing is computed.

    Args:
        module: The network.
        shape: Shape of the input of one picture.
    """
    tensors = [*module.parameters(), *module.buffers()]
    shapes: dict[int, object] = {id(t): _on_meta(t) for t in tensors}  # so that the copy has no values
    skeleton = copy.deepcopy(module, shapes).eval()  # in evaluation mode, batch norms take a single picture
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        out: Tensor = skeleton(torch.zeros(1, *shape, device="meta"))
        if out.requires_grad:
            out.sum().backward()
    return float(counter.get_total_flops()), tuple(out.shape[1:])


def step_seconds(module: nn.Module, features: Tensor, precision: Precision) -> float:
    """Return the seconds of a forward and backward pass without any exchange.

    Gradients and random number generators are left as they were.

    Args:
        module: The network, without gradients.
        features: Its input, float32 (n, ...).
        precision: The precision of the forward pass.
    """
    state = torch.get_rng_state(), (torch.cuda.get_rng_state(features.device) if features.is_cuda else None)

    def run() -> None:
        with precision.autocast():
            scores = module(features)
        scores.float().sum().backward()
        module.zero_grad(set_to_none=True)

    try:
        return _seconds(run, features.device)
    finally:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], features.device)


def _on_meta(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _seconds(run: Callable[[], object], device: torch.device, enough: float = float("inf")) -> float:
    """Return the least seconds of a few runs after a first one, or those of the first if it took `enough`."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = once()
    stop = first > enough
    if dist.is_initialized() and enough < float("inf"):
        # Rank 0 decides for all workers, because each further run is a collective operation.
        decision = torch.tensor([float(stop)], device=device)
        dist.broadcast(decision, src=0)
        stop = bool(decision.item())
    return first if stop else min(once() for _ in range(_REPEATS))
