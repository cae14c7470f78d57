"""How long a training step takes, from the sizes of the model and the rates of the machines: `docs/scaling.md`.

A step computes, for which it needs the larger of the time for its arithmetic and the time to move its weights
through memory (the roofline of Williams, Waterman and Patterson 2009, CACM 52), and then waits for the link.
"""

from __future__ import annotations

from dataclasses import dataclass

from cvdist.parallel.traffic import ring_bytes

# Times that each trained weight passes through memory in a step, in float32: read forward and backward, its
# gradient written; then read by the optimiser with the gradient and the momentum, and two of the three written.
PASSES = 8
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What a step of the trained layers is, for the whole batch.

    batch: pictures. flops: of a picture, forward and backward. parameters: that are trained, of which
    split_parameters can be split over workers and data_parameters lie before the classifier. columns: outputs
    of the second linear layer. gathered: values of a picture that the classifier gets, 0 if every worker reads
    them itself. activation_bytes: of a value that workers exchange.
    """

    batch: int
    flops: float
    parameters: int
    split_parameters: int = 0
    data_parameters: int = 0
    columns: int = 0
    gathered: int = 0
    activation_bytes: int = _FLOAT


@dataclass(frozen=True)
class Machine:
    """What a worker can do, at the same time as the others.

    matrix_rate: FLOP/s; memory_rate: bytes/s, read and written; link_rate: bytes/s that it sends to another;
    latency: seconds of the smallest all-reduce.
    """

    matrix_rate: float
    memory_rate: float
    link_rate: float = float("inf")
    latency: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and bytes that each worker sends in it."""

    arithmetic: float
    memory: float
    communication: float
    sent: float

    @property
    def seconds(self) -> float:
        """All of it. Computing and waiting are not overlapped: the largest layer's gradient comes last."""
        return max(self.arithmetic, self.memory) + self.communication


def data_parallel(work: Work, machine: Machine, workers: int, gradient_bytes: float = _FLOAT) -> Cost:
    """Each worker computes its share of the batch with all weights, and all gradients are averaged.

    gradient_bytes: a parameter's, as they are exchanged.
    """
    sent = ring_bytes(work.parameters * gradient_bytes, workers)
    return Cost(
        arithmetic=work.flops * -(-work.batch // workers) / machine.matrix_rate,
        memory=work.parameters * _FLOAT * PASSES / machine.memory_rate,
        communication=sent / machine.link_rate + (machine.latency if workers > 1 else 0.0),
        sent=sent,
    )


def split_head(work: Work, machine: Machine, workers: int, gradient_bytes: float = _FLOAT) -> Cost:
    """Each worker computes the whole batch with its part of the weights; activations are summed.

    Where the classifier's input is gathered and trained, its gradient is summed as well, and the layers before
    it are data-parallel.
    """
    rows = work.batch * work.activation_bytes
    exchanges = [ring_bytes(rows * work.columns, workers)]
    if work.gathered:
        exchanges.append((workers - 1) / workers * rows * work.gathered)
    if work.data_parameters:
        exchanges.append(ring_bytes(work.batch * _FLOAT * work.gathered, workers))
        exchanges.append(ring_bytes(work.data_parameters * gradient_bytes, workers))
    kept = work.parameters - work.split_parameters + work.split_parameters / workers
    sent = sum(exchanges)
    return Cost(
        arithmetic=work.flops * work.batch / workers / machine.matrix_rate,
        memory=kept * _FLOAT * PASSES / machine.memory_rate,
        communication=sent / machine.link_rate + len(exchanges) * (machine.latency if workers > 1 else 0.0),
        sent=sent,
    )


def floor(work: Work, machine: Machine, workers: int, *, split: bool) -> float:
    """Seconds that a step of a worker takes at least, by its arithmetic or its memory."""
    cost = (split_head if split else data_parallel)(work, machine, workers)
    return max(cost.arithmetic, cost.memory)
