"""Losses and weights that are no finite numbers any more: found without waiting in each step, named by sample.

A step leaves its loss on the device. When the sums are reduced, every `--log-every-steps` steps and before each
checkpoint, one look at the sum says whether all of these losses were finite. Only if not are the single losses
read back, and the first bad one names its batch. No checkpoint is written in between, so that none can hold
weights that such a step has spoiled; a gradient that overflows behind a finite loss is found by the weights'
norm, which each checkpoint waits for.
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
    """The training has diverged: the same again would diverge again."""


class LossWatch:
    """The losses and samples of the steps since the last look, of this worker."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._steps: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, indices: Tensor) -> None:
        """A step's summed loss, a scalar on the device, and its rows, int64 (n,) on the CPU."""
        self._steps.append((loss, indices))

    def require_finite(
        self, loss: float, step: int, epoch: int, names: Callable[[Sequence[int]], list[str]]
    ) -> None:
        """Forget the steps up to `step`, whose losses sum to `loss` over all workers. All workers call it.

        names: what a person knows rows of the training data by.

        Raises:
            NotFinite: on all workers, if one of the losses was not finite, with the step and its samples.
        """
        steps, self._steps = self._steps, []
        if math.isfinite(loss):
            return
        first = step - len(steps) + 1
        bad = [number for number, (value, _) in enumerate(steps) if not math.isfinite(value.item())]
        # The worker whose sample broke it is the first; the others follow with the weights that it spoiled.
        at = min(found for found in gather(bad[0] if bad else len(steps)))
        mine = steps[at] if at < len(steps) and at in bad else None
        # Once each: with a split head all workers have the same ones.
        rows = list(dict.fromkeys(row for part in gather(mine[1].tolist() if mine else []) for row in part))
        raise NotFinite(
            f"the loss became {loss} in step {first + min(at, len(steps) - 1)} of epoch {epoch}, whose "
            f"{len(rows)} training samples were {_some(rows, names)}: {_ADVICE}, or look at these samples",
            on_all_workers=True,
        )


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Refuse to save weights that are spoiled, as the checkpoint `name`.

    Raises:
        NotFinite: if a parameter is not finite. All workers hold the same ones.
    """
    parameters: Iterable[Tensor] = [p.detach() for p in model.parameters() if p.requires_grad]
    norms = torch._foreach_norm(list(parameters), ord=math.inf)
    if norms and not bool(torch.stack(list(norms)).isfinite().all()):
        raise NotFinite(
            f"the weights are no finite numbers any more at {name}, which is not saved: {_ADVICE}",
            on_all_workers=True,
        )


def _some(rows: Sequence[int], names: Callable[[Sequence[int]], list[str]]) -> str:
    shown = ", ".join(names(rows[:_SHOWN]))
    return f"{shown} and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else shown
