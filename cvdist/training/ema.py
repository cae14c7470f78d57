"""The exponential moving average of the weights, updated without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build(model: nn.Module, decay: float) -> AveragedModel:
    """Make a moving average of `model`. Its first update copies the weights, and its counter stays on the CPU.

    Args:
        model: The trained modules.
        decay: The factor by which each update shrinks the weight of all earlier ones.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def update(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """Add the present weights of `model` to the average.

    This computes what `average.update_parameters(model)` computes. That method copies the counter to the device
    in each step, and such a copy waits until the device has finished all earlier work.
    """
    assert isinstance(average.n_averaged, Tensor) and average.n_averaged.device.type == "cpu"
    if not int(average.n_averaged):
        average.update_parameters(model)
        return
    pairs = list(zip(_tensors(average.module), _tensors(model), strict=True))
    moving = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in moving], [value for _, value in moving], 1 - decay)
    for mean, value in pairs:
        if not mean.is_floating_point():  # the counters of batch norms
            mean.copy_(mean * decay + value * (1 - decay))
    average.n_averaged += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
