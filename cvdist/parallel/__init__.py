"""How a training step is divided over the workers.

`data`: each worker computes its share of the batch with all of the model, and the gradients are averaged.
`head`: the linear layers are split over the workers, which exchange activations instead (Krizhevsky 2014, "One
weird trick for parallelizing convolutional neural networks", arXiv:1404.5997). `docs/scaling.md` compares the
two.
"""

from cvdist.parallel.choose import can_split, choose
from cvdist.parallel.modes import DataParallel, Mode, SplitHead

__all__ = ["DataParallel", "Mode", "SplitHead", "can_split", "choose"]
