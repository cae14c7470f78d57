"""How a training step is divided over the workers.

In mode `data`, each worker computes its local batch with the whole model, and the gradients are averaged. In
mode `head`, the classifier's first two linear layers are split over the workers, which exchange activations
instead (Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997).
`docs/scaling.md` compares the two.
"""

from cvdist.parallel.modes import DataParallel, Mode, SplitHead
from cvdist.parallel.plan import ParallelPlan, can_split, choose_plan

__all__ = ["DataParallel", "Mode", "ParallelPlan", "SplitHead", "can_split", "choose_plan"]
