"""The optimizer, its parameter groups, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cvdist.config import OptimizerConfig
from cvdist.errors import UserError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(
    model: nn.Module, settings: OptimizerConfig, *, stages: Sequence[nn.Module] = ()
) -> torch.optim.Optimizer:
    """Build SGD or AdamW over the trained parameters.

    The learning rate of each step comes from `set_learning_rate`, which must be called before the first step.

    Args:
        model: The trained modules.
        settings: The kind of optimizer and its constants.
        stages: The stages of the backbone in `model`, which have a learning rate of their own.
    """
    scale_of: dict[nn.Parameter, float] = {}
    for distance, stage in enumerate(reversed(stages), start=1):
        scale = settings.backbone_lr_scale * settings.layer_decay**distance
        scale_of |= dict.fromkeys(stage.parameters(), scale)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay_of = _weight_decays(model, settings)
    groups = _groups([p for p in trained if p not in scale_of], decay_of, 1.0)
    for scale in sorted(set(scale_of.values()), reverse=True):
        groups += _groups([p for p in trained if scale_of.get(p) == scale], decay_of, scale)
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
            f"checkpoint {name} trained other layers than this run does: set --trainable-stages and "
            "--layer-decay as they were, or start under another --name"
        ) from error
    adam = isinstance(optimizer, torch.optim.AdamW)
    if any(("exp_avg" in buffers) != adam for buffers in state["state"].values()):
        raise UserError(f"checkpoint {name} is of another --optimizer: set it as it was")
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _weight_decays(model: nn.Module, settings: OptimizerConfig) -> dict[nn.Parameter, tuple[str, float]]:
    """Return the kind of each parameter, and the weight decay of that kind."""
    found = {
        p: ("weight", settings.weight_decay) if p.ndim > 1 else ("bias", settings.bias_weight_decay)
        for p in model.parameters()
    }
    norms = (layer for layer in model.modules() if isinstance(layer, _NORMS))
    return found | {p: ("norm", settings.norm_weight_decay) for layer in norms for p in layer.parameters()}


def _groups(
    parameters: list[nn.Parameter], decay_of: dict[nn.Parameter, tuple[str, float]], lr_scale: float
) -> list[dict[str, Any]]:
    """Return a group for each kind of parameter that there is, whatever the weight decays are."""
    groups: dict[str, dict[str, Any]] = {}
    for kind in ("weight", "bias", "norm"):
        for p in parameters:
            if decay_of[p][0] == kind:
                new = {"params": [], "weight_decay": decay_of[p][1], "lr_scale": lr_scale}
                groups.setdefault(kind, new)["params"].append(p)
    return list(groups.values())
