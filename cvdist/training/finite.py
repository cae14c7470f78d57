"""Finds losses and weights that are not finite, without waiting for the device in each step.

A step leaves its loss on the device. When the sums are reduced, every `--log-every-steps` steps and before each
checkpoint, the sum tells whether all of these losses were finite. Only if it is not are the single losses read,
to name the samples of the first bad step. No checkpoint is written before that, so none can hold weights that
such a step has spoiled. A gradient that overflows behind a finite loss is found by the norm of the weights,
which is computed for each checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from cvdist.distributed.collectives import gather
from cvdist.errors import UserError

_SHOWN = 8  # samples that a message names
_ADVICE = "lower --lr, set --clip-grad-norm, or use --precision float32"


class NotFinite(UserError):
    """Raised if training has diverged, and would diverge again if it were repeated."""


class LossWatch:
    """Remembers this worker's losses and samples of the steps since the last check."""

    def __init__(self, names: Callable[[Sequence[int]], list[str]]) -> None:
        """Start without any steps. `names` returns what people call some rows of the training data."""
        self._names = names
        self._steps: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, indices: Tensor) -> None:
        """Remember a step.

        Args:
            loss: The sum of its losses, a scalar on the device.
            indices: The rows of its samples, int64 (n,) on the CPU.
        """
        self._steps.append((loss, indices))

    def require_finite(self, loss: float, epoch: int, step: int) -> None:
        """Check the losses of the steps since the last call, and forget them. All workers must call this.

        Args:
            loss: The sum of these losses, over all workers.
            epoch: The epoch, counted from 1.
            step: The last of these steps, counted from 1 within the epoch.

        Raises:
            NotFinite: On all workers, if one of the losses was not finite, with the step and its samples.
        """
        steps, self._steps = self._steps, []
        if math.isfinite(loss):
            return
        first = step - len(steps) + 1
        bad = [number for number, (value, _) in enumerate(steps) if not math.isfinite(value.item())]
        # The worker with the bad sample is the first one. The others follow, with the weights that it spoiled.
        at = min(found for found in gather(bad[0] if bad else len(steps)))
        mine = steps[at] if at < len(steps) and at in bad else None
        # Each row once, because with a split head all workers have the same samples.
        rows = list(dict.fromkeys(row for some in gather(mine[1].tolist() if mine else []) for row in some))
        raise NotFinite(
            f"the loss became {loss} in step {first + min(at, len(steps) - 1)} of epoch {epoch}, whose "
            f"{len(rows)} training samples were {self._some(rows)}: {_ADVICE}, or look at these samples",
            on_all_workers=True,
        )

    def _some(self, rows: Sequence[int]) -> str:
        shown = ", ".join(self._names(rows[:_SHOWN]))
        return f"{shown} and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else shown


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Check the trained parameters of `model` before they are saved as the checkpoint `name`.

    Raises:
        NotFinite: If a parameter is not finite.
    """
    parameters: Iterable[Tensor] = [p.detach() for p in model.parameters() if p.requires_grad]
    norms = torch._foreach_norm(list(parameters), ord=math.inf)
    if norms and not bool(torch.stack(list(norms)).isfinite().all()):
        raise NotFinite(
            f"the weights are no finite numbers any more at {name}, which is not saved: {_ADVICE}",
            on_all_workers=True,
        )
