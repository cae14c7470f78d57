"""How the learning rate changes in the course of a run."""

from __future__ import annotations

import math

from cvdist.config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, epochs: int, done: float) -> float:
    """Return the learning rate of the step that follows after `done` epochs.

    The rate grows linearly in the warm-up. Then it is constant, or falls to 0 along half a cosine (Loshchilov
    and Hutter 2017, arXiv:1608.03983, without restarts). It depends on the progress alone, so there is no state
    of a schedule that a checkpoint would have to keep.

    Args:
        settings: The peak rate and the kind of schedule.
        epochs: Length of the run, in epochs.
        done: Epochs done, with fractions within an epoch.
    """
    if done < settings.lr_warmup_epochs:
        # Not from 0, because the very first step would change nothing.
        return settings.lr * max(done / settings.lr_warmup_epochs, 0.01)
    if settings.lr_scheduler == "constant":
        return settings.lr
    fraction = (done - settings.lr_warmup_epochs) / max(epochs - settings.lr_warmup_epochs, 1e-9)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
