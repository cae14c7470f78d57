"""The learning rate in the course of a run."""

from __future__ import annotations

import math

from cvdist.config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, epochs: int, done: float) -> float:
    """Return the learning rate of the step that follows after `done` epochs.

    The rate grows linearly in the warm-up. Then it is constant or falls; the cosine is that of Loshchilov and
    Hutter 2017, arXiv:1608.03983, without restarts. At the beginning of each epoch it is the rate of PyTorch's
    scheduler of the same name. It depends on the progress alone, so there is no state of a schedule that a
    checkpoint would have to keep.

    Args:
        settings: The peak rate and the kind of schedule.
        epochs: Length of the run, in epochs.
        done: Epochs done, with fractions within an epoch.
    """
    if done < settings.lr_warmup_epochs:
        # Not from 0, because the very first step would change nothing.
        return settings.lr * max(done / settings.lr_warmup_epochs, 0.01)
    done -= settings.lr_warmup_epochs
    fraction = min(done / max(epochs - settings.lr_warmup_epochs, 1e-9), 1.0)
    match settings.lr_scheduler:
        case "cosine":
            return settings.lr * 0.5 * (1 + math.cos(math.pi * fraction))
        case "polynomial":
            return settings.lr * (1 - fraction) ** settings.lr_power
        case "step":
            return settings.lr * settings.lr_gamma ** (done // settings.lr_step_size)
        case "exponential":
            return settings.lr * settings.lr_gamma**done
        case "constant":
            return settings.lr
