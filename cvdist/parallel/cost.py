"""A model of how long a training step takes, from the sizes of the network and the rates of the machines.

A step computes and waits. Computing is the forward and the backward pass, which take the longer of the time for
their arithmetic and the time to move their weights through memory (the roofline of Williams, Waterman and
Patterson 2009, CACM 52), and then the update, which is bound by memory alone. A step waits for the link while
it has nothing to compute, and for its inputs if they arrive more slowly than it computes. `docs/scaling.md`
derives the formulas and compares them with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cvdist.distributed.traffic import ring_bytes

# How often each trained weight passes through memory in a step, in float32. The gradients need two passes: the
# weight is read forward, and its gradient is written. The update needs five: weight, gradient and momentum are
# read, weight and momentum are written. Reading the weight backward is left out, because the largest layer's
# inputs are frozen.
GRADIENT_PASSES, UPDATE_PASSES = 2, 5
PASSES = GRADIENT_PASSES + UPDATE_PASSES
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """The size of a training step, over all workers.

    Attributes:
        batch: Pictures in the global batch.
        flops: FLOP of one picture's forward and backward pass through the trained layers.
        parameters: Trained parameters.
        split_parameters: Those of them that can be split over the workers.
        data_parameters: Those of them in front of the classifier.
        columns: Outputs of the classifier's second linear layer.
        gathered: Values of one picture that the classifier gets. 0 if every worker reads them from a cache.
        activation_bytes: Bytes of a value that the workers exchange.
        early_parameters: Parameters whose gradients are known before the backward pass reaches the layer whose
            gradient is computed last.
        input_bytes: Bytes of one picture, as it is read.
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
    """The rates that each worker reaches while all others do the same.

    Attributes:
        matrix_rate: FLOP/s of matrix products.
        memory_rate: Bytes/s read and written.
        link_rate: Bytes/s sent to another worker.
        latency: Seconds of the smallest all-reduce.
        input_rate: Bytes/s of inputs that arrive.
    """

    matrix_rate: float
    memory_rate: float
    link_rate: float = float("inf")
    latency: float = 0.0
    input_rate: float = float("inf")


@dataclass(frozen=True)
class Cost:
    """The bytes, operations and seconds that a step costs each worker.

    Attributes:
        arithmetic: Seconds of arithmetic.
        memory: Seconds in which weights, gradients and momentum pass through memory.
        communication: Seconds of waiting for other workers with nothing left to compute.
        sent: Bytes sent.
        inputs: Seconds in which the inputs of a step arrive, while the step before it is computed.
    """

    arithmetic: float
    memory: float
    communication: float
    sent: float
    inputs: float = 0.0

    @property
    def gradients(self) -> float:
        """Seconds of the forward and the backward pass."""
        return max(self.arithmetic, self.memory * GRADIENT_PASSES / PASSES)

    @property
    def computing(self) -> float:
        """Seconds of the forward and the backward pass and the update."""
        return self.gradients + self.memory * UPDATE_PASSES / PASSES

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return max(self.computing + self.communication, self.inputs)


def data_parallel(work: Work, machine: Machine, workers: int, gradient_bytes: float = _FLOAT) -> Cost:
    """Return the cost of a step where each worker has the whole model, and all gradients are averaged.

    The early gradients are exchanged while that of the last layer's weights is computed, which takes 2 FLOP for
    each of its weights and each picture.

    Args:
        work: The size of the step.
        machine: The rates of a worker.
        workers: Number of workers.
        gradient_bytes: Bytes that one parameter's gradient takes in the exchange.
    """
    local = -(-work.batch // workers)
    sent = ring_bytes(work.parameters * gradient_bytes, workers)
    early = ring_bytes(work.early_parameters * gradient_bytes, workers)
    alone = Cost(
        arithmetic=work.flops * local / machine.matrix_rate,
        memory=work.parameters * _FLOAT * PASSES / machine.memory_rate,
        communication=0.0,
        sent=sent,
        inputs=local * work.input_bytes / machine.input_rate,
    )
    last = min(2 * (work.parameters - work.early_parameters) / work.flops, 1.0) if work.flops else 0.0
    hidden = min(early / machine.link_rate, last * alone.gradients)
    waiting = sent / machine.link_rate - hidden + (machine.latency if workers > 1 else 0.0)
    return replace(alone, communication=waiting)


def split_head(work: Work, machine: Machine, workers: int, gradient_bytes: float = _FLOAT) -> Cost:
    """Return the cost of a step where each worker has a shard of the classifier and computes the global batch.

    Activations are summed over the workers. With a cache, each worker reads the whole global batch. Otherwise
    the classifier's input is gathered; if the layers in front of it are trained, its gradient is summed as
    well, and these layers are data parallel.

    Args:
        work: The size of the step.
        machine: The rates of a worker.
        workers: Number of workers.
        gradient_bytes: Bytes that one parameter's gradient takes in the exchange.
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
        memory=parameters_per_worker(work, workers) * _FLOAT * PASSES / machine.memory_rate,
        communication=sent / machine.link_rate + len(exchanges) * (machine.latency if workers > 1 else 0.0),
        sent=sent,
        inputs=read * work.input_bytes / machine.input_rate,
    )


def parameters_per_worker(work: Work, workers: int) -> float:
    """Return how many trained parameters each worker has if the head is split.

    In training, each of them takes three float32 values.
    """
    return work.parameters - work.split_parameters + work.split_parameters / workers


def min_step_seconds(work: Work, machine: Machine, workers: int, *, split: bool) -> float:
    """Return the least seconds that a step can take, bound by arithmetic or by memory, whichever is longer."""
    cost = (split_head if split else data_parallel)(work, machine, workers)
    return max(cost.arithmetic, cost.memory)
