"""The optimizer, its parameter groups, and its state in checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cvdist.config import OptimizerConfig
from cvdist.errors import UserError


def build_optimizer(
    model: nn.Module,
    settings: OptimizerConfig,
    *,
    backbone: nn.Module | None = None,
    backbone_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """Build SGD or AdamW over the trained parameters. Only matrices and kernels have weight decay.

    The learning rate of each step comes from `set_learning_rate`, which must be called before the first step.

    Args:
        model: The trained modules.
        settings: The kind of optimizer and its constants.
        backbone: Layers of `model` with a learning rate of their own.
        backbone_lr_scale: The backbone's learning rate as a multiple of that of the other layers.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    slow = set(backbone.parameters()) if backbone is not None else set()
    groups = _groups([p for p in trained if p not in slow], settings.weight_decay, lr_scale=1.0)
    groups += _groups([p for p in trained if p in slow], settings.weight_decay, lr_scale=backbone_lr_scale)
    # Fused, so that one kernel updates all tensors: most of a small network's update is the cost of the calls.
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step use the learning rate `rate`, of which each parameter group takes its own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str) -> None:
    """Load momentum and step counts from a checkpoint. The settings stay those of this run.

    Args:
        optimizer: This run's optimizer.
        state: The state dict of the checkpoint's optimizer.
        name: The checkpoint's name, for messages.

    Raises:
        UserError: If the checkpoint trained other layers, or with another kind of optimizer.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise UserError(
            f"checkpoint {name} trained other layers than this run does: set --trainable-stages as it was, or "
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
