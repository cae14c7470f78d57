"""The first epochs of a run, in which the backbone stays as it is while the head is trained."""

from __future__ import annotations

from cvdist.training.run import Run


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
