"""How long a training step takes, from the sizes of the model and the rates of the machines: `docs/scaling.md`.

A step computes: forward and backward, for which it needs the larger of the time for its arithmetic and the time
to move its weights through memory (the roofline of Williams, Waterman and Patterson 2009, CACM 52), then the
update, which is memory alone. It waits for the link where it has nothing to compute meanwhile, and for its
inputs where they come more slowly than all that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cvdist.distributed.traffic import ring_bytes

# Times that each trained weight passes through memory in a step, in float32: read in the forward pass, and its
# gradient written; then weight, gradient and momentum read, and weight and momentum written. Reading it in the
# backward pass is left out: the largest layer's inputs are frozen.
GRADIENT_PASSES, UPDATE_PASSES = 2, 5
PASSES = GRADIENT_PASSES + UPDATE_PASSES
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What a step of the trained layers is, for the whole batch.

    batch: pictures. flops: of a picture, forward and backward. parameters: that are trained, of which
    split_parameters can be split over workers and data_parameters lie before the classifier. columns: outputs
    of the second linear layer. gathered: values of a picture that the classifier gets, 0 if every worker reads
    them itself. activation_bytes: of a value that workers exchange. early_parameters: whose gradients are done
    before the backward pass comes to the layer that is computed last. input_bytes: of a picture, as it is read.
    """

    batch: int
    flops: float
    parameters: int
    split_parameters: int = 0
    data_parameters: int = 0
    columns: int = 0
    gathered: int = 0
    activation_bytes: int = _FLOAT
    early_parameters: int = 0
    input_bytes: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What a worker can do, at the same time as the others.

    matrix_rate: FLOP/s; memory_rate: bytes/s, read and written; link_rate: bytes/s that it sends to another;
    latency: seconds of the smallest all-reduce; input_rate: bytes/s at which it gets its inputs.
    """

    matrix_rate: float
    memory_rate: float
    link_rate: float = float("inf")
    latency: float = 0.0
    input_rate: float = float("inf")


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and bytes that each worker sends in it.

    communication: for which nothing is left to compute. inputs: to get those of a step, while the one before
    it is computed.
    """

    arithmetic: float
    memory: float
    communication: float
    sent: float
    inputs: float = 0.0

    @property
    def gradients(self) -> float:
        """Seconds of forward and backward pass."""
        return max(self.arithmetic, self.memory * GRADIENT_PASSES / PASSES)

    @property
    def computing(self) -> float:
        """Of these and the update."""
        return self.gradients + self.memory * UPDATE_PASSES / PASSES

    @property
    def seconds(self) -> float:
        """All of it."""
        return max(self.computing + self.communication, self.inputs)


def data_parallel(work: Work, machine: Machine, workers: int, gradient_bytes: float = _FLOAT) -> Cost:
    """Each worker computes its share of the batch with all weights, and all gradients are averaged.

    The early gradients are on their way while that of the last layer's weights is computed, 2 of the FLOP for
    each weight and picture. gradient_bytes: a parameter's, as they are exchanged.
    """
    share = -(-work.batch // workers)
    sent = ring_bytes(work.parameters * gradient_bytes, workers)
    early = ring_bytes(work.early_parameters * gradient_bytes, workers)
    alone = Cost(
        arithmetic=work.flops * share / machine.matrix_rate,
        memory=work.parameters * _FLOAT * PASSES / machine.memory_rate,
        communication=0.0,
        sent=sent,
        inputs=share * work.input_bytes / machine.input_rate,
    )
    last = min(2 * (work.parameters - work.early_parameters) / work.flops, 1.0) if work.flops else 0.0
    hidden = min(early / machine.link_rate, last * alone.gradients)
    waiting = sent / machine.link_rate - hidden + (machine.latency if workers > 1 else 0.0)
    return replace(alone, communication=waiting)


def split_head(work: Work, machine: Machine, workers: int, gradient_bytes: float = _FLOAT) -> Cost:
    """Each worker computes the whole batch with its part of the weights; activations are summed.

    From a cache, each reads all of the batch. Where the classifier's input is gathered and trained, its
    gradient is summed as well, and the layers before it are data-parallel.
    """
    rows = work.batch * work.activation_bytes
    exchanges = [ring_bytes(rows * work.columns, workers)]
    if work.gathered:
        exchanges.append((workers - 1) / workers * rows * work.gathered)
    if work.data_parameters:
        exchanges.append(ring_bytes(work.batch * _FLOAT * work.gathered, workers))
        exchanges.append(ring_bytes(work.data_parameters * gradient_bytes, workers))
    sent = sum(exchanges)
    read = -(-work.batch // workers) if work.gathered else work.batch
    return Cost(
        arithmetic=work.flops * work.batch / workers / machine.matrix_rate,
        memory=kept(work, workers) * _FLOAT * PASSES / machine.memory_rate,
        communication=sent / machine.link_rate + len(exchanges) * (machine.latency if workers > 1 else 0.0),
        sent=sent,
        inputs=read * work.input_bytes / machine.input_rate,
    )


def kept(work: Work, workers: int) -> float:
    """Parameters on each worker with the head split; in training, three float32 values for each."""
    return work.parameters - work.split_parameters + work.split_parameters / workers


def min_step_seconds(work: Work, machine: Machine, workers: int, *, split: bool) -> float:
    """Seconds that a step of a worker takes at least, by its arithmetic or its memory."""
    cost = (split_head if split else data_parallel)(work, machine, workers)
    return max(cost.arithmetic, cost.memory)
