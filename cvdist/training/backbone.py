"""The trained stages of a pretrained model: which settings need them, and how and when they train."""

from __future__ import annotations

from cvdist.config import TrainConfig
from cvdist.errors import UserError
from cvdist.models import FrozenAndTrained
from cvdist.training.run import Run


def prepare(config: TrainConfig, modules: FrozenAndTrained) -> None:
    """Check that there are stages if settings need some, and set how the backward pass computes them.

    Raises:
        UserError: If there are none, naming the flag.
    """
    given = {
        "--layer-decay": config.optimizer.layer_decay != 1,
        "--freeze-epochs": config.optimizer.freeze_epochs > 0,
        "--grad-checkpointing": config.loop.grad_checkpointing,
    }
    flag = next((flag for flag, chosen in given.items() if chosen), "")
    if flag and not modules.stages:
        raise UserError(
            f"{flag} is for the trained stages of a pretrained model, and this run has none: set "
            "--trainable-stages, or leave it out"
        )
    if config.loop.grad_checkpointing:
        modules.recompute_stages()


def begin_epoch(run: Run, epoch: int) -> None:
    """Set training mode, and freeze the backbone or train it, as it is due in this epoch, counted from 1.

    A frozen backbone has no gradients, and its batch norms keep their statistics. All workers must call this.
    """
    backbone, until = run.backbone, run.config.optimizer.freeze_epochs
    frozen = epoch <= until
    if backbone is not None and until:
        changed = [p for p in backbone.parameters() if p.requires_grad == frozen]
        for parameter in changed:
            parameter.requires_grad_(not frozen)
        if changed:
            run.mode.wrap()
    run.mode.replica.train()
    if backbone is not None and frozen:
        backbone.eval()
