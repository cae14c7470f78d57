"""The optimiser and the learning rate's way through a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cvdist.config import OptimizerConfig
from cvdist.errors import UserError


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    backbone: nn.Module | None = None,
    backbone_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that are trained; weight decay for matrices and kernels only.

    backbone: layers of `model` whose learning rate is `backbone_lr_scale` times that of the others, once
    `set_learning_rate` has been called.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    slow = set(backbone.parameters()) if backbone is not None else set()
    groups = _groups([p for p in trained if p not in slow], config.weight_decay, lr_scale=1.0)
    groups += _groups([p for p in trained if p in slow], config.weight_decay, lr_scale=backbone_lr_scale)
    # Fused: one kernel updates all tensors, where a small network's update is mostly fixed costs.
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step use `rate`, each group its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str) -> None:
    """Momentum and step counts of a checkpoint called `name`; the settings stay those of this run.

    Raises:
        UserError: if the checkpoint trained other layers, or with another optimiser.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise UserError(
            f"checkpoint {name} trained other layers than this run does: set --trainable-blocks as it was, or "
            "start under another --name"
        ) from error
    adam = isinstance(optimizer, torch.optim.AdamW)
    if any(("exp_avg" in buffers) != adam for buffers in state["state"].values()):
        raise UserError(f"checkpoint {name} is of another --optimizer: set it as it was")
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _groups(parameters: list[nn.Parameter], weight_decay: float, lr_scale: float) -> list[dict[str, Any]]:
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": others, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimizerConfig, epoch: float, epochs: int) -> float:
    """The rate after `epoch` epochs (a fraction within an epoch) of `epochs`.

    Linear warm-up, then constant or half a cosine down to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983,
    without restarts). A pure function of progress: there is no schedule state to save or to lose.
    """
    if epoch < config.lr_warmup_epochs:
        # Not from 0: the very first step would be wasted.
        return config.lr * max(epoch / config.lr_warmup_epochs, 0.01)
    if config.lr_scheduler == "constant":
        return config.lr
    progress = (epoch - config.lr_warmup_epochs) / max(epochs - config.lr_warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
