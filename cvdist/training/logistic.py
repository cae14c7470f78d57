"""Multinomial logistic regression, solved to its optimum: a linear classifier on fixed features.

The mean cross-entropy plus half a penalty times the squared weights is a convex function (Bishop 2006, "Pattern
Recognition and Machine Learning", section 4.3.4). It is minimized with L-BFGS over all samples at once (Liu and
Nocedal 1989, "On the limited memory BFGS method for large scale optimization"), as for the linear probes of
Radford et al. 2021, arXiv:2103.00020. For N samples, scikit-learn's `LogisticRegression(C=1 / (penalty * N))`
has the same optimum. For two classes, which it gives one weight vector in place of two, that is `C=2 / (penalty
* N)`, and its vector is the difference of the two.

Where a picture may have several classes, each class has a regression of its own, of having it against not
having it. Their losses are added up, and they have one penalty in common. For each class, scikit-learn's
`LogisticRegression(C=1 / (penalty * N))` has the same optimum.

The penalty is the one with the lowest loss on training pictures that are held out, and of equal ones the
strongest. Their number of mistakes would be decided by a picture or two, and by how processors round. Penalties
are tried from the strongest one down, each solution being the start of the next. The features are standardized,
and the result is expressed for the features as they are.

Rank 0 runs PyTorch's L-BFGS with a strong Wolfe line search, and tells the other workers where to compute loss
and gradient next. If each worker ran it, processors that round differently would disagree about the number of
passes, and wait for each other forever. SciPy's L-BFGS-B takes as many passes, but its own arithmetic took five
times as long as a pass for 64,000 weights: 5.2 s in place of 1.8 s of one core for 1,536 x 1,280 features, ten
classes and five folds at one penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvdist.distributed.collectives import broadcast, sum_over_workers
from cvdist.results import HeldOut
from cvdist.seeding import generator
from cvdist.training.loss import correct

# Penalties that are tried, in this order.
PENALTIES: tuple[float, ...] = tuple(float(penalty) for penalty in np.logspace(1, -5, 13))
FOLDS = 5  # each holds out a fifth of the pictures
# Up to this many pictures, each of them is held out once. Of more pictures, a fifth says enough.
CROSS_VALIDATED = 10_000
# Weights of all folds together, which are solved side by side: the optimizer takes 200 bytes for each.
_MOST_WEIGHTS = 5_000_000
# Losses of held-out pictures count as equal if they differ by no more than this, or are all below it. Separable
# samples have such losses at many penalties, and rounding would decide between them. It may still decide with
# few pictures and many thousand inputs, where it moves losses by as much, because solutions end at `_COARSE`.
_TIE = 1e-3
# The path ends when held-out pictures had no lower loss this often in a row.
_PATIENCE = 2
# Largest derivative of the solution, while penalties are compared and at the end. scikit-learn stops at 1e-4.
# With one label a picture, it is larger where steps in float32 no longer lower the objective.
_COARSE, _FINE = 3e-4, 1e-5
_MOST_STEPS = 1000  # for each penalty
_SCORES = 2**22  # computed at a time
# A feature whose standard deviation is a smaller fraction of its mean is taken as constant: the weight of so
# small a difference could not be expressed for the feature as it is, in float32.
_CONSTANT = 1e-4


@dataclass(frozen=True)
class Part:
    """Some of this worker's samples.

    Attributes:
        inputs: float (n, d).
        labels: int64 (n,); or 1 for a picture's classes and 0 for the others, (n, classes).
        rows: int64 (n,), the pictures' rows in the training data.
        first: Whether they are the pictures as they are. The other views of a picture are samples as well, but
            only the first one is counted where predictions are.
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor
    first: bool


Passes = Callable[[], Iterable[Part]]
"""Begins a pass over this worker's samples. In all passes of all workers, each sample occurs once."""

Weigh = Callable[[Part], Tensor]
"""Returns the weights of samples in each of k problems, float (n, k)."""


@dataclass(frozen=True)
class Scaling:
    """The standardization of inputs: (inputs - mean) * factor.

    Attributes:
        mean: float64 (d,).
        factor: float64 (d,), one over the standard deviation; 0 for constant inputs.
        count: Number of samples.
    """

    mean: Tensor
    factor: Tensor
    count: int

    def apply(self, inputs: Tensor) -> Tensor:
        """Return standardized inputs (n, d), in the dtype of `inputs`."""
        return (inputs - self.mean.to(inputs.dtype)) * self.factor.to(inputs.dtype)

    def fold(self, coefficients: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight (classes, d) and bias (classes,) that give the same scores for inputs as they are.

        Args:
            coefficients: float64 (d, classes).
            bias: float64 (classes,).
        """
        weight = coefficients * self.factor[:, None]
        return weight.T.contiguous(), bias - self.mean @ weight


def measure_scaling(passes: Passes, inputs: int, device: torch.device) -> Scaling:
    """Compute mean and standard deviation of each input over the samples of all workers."""
    sums = torch.zeros(2 * inputs + 1, dtype=torch.float64, device=device)
    for part in passes():
        values = part.inputs.double()
        sums += torch.cat([values.sum(0), values.square().sum(0), values.new_tensor([len(values)])])
    total, squares, counted = sum_over_workers(sums).split([inputs, inputs, 1])
    mean = total / counted
    deviation = (squares / counted - mean.square()).clamp(min=0).sqrt()
    constant = deviation <= _CONSTANT * mean.abs()
    return Scaling(mean, torch.where(constant, 0.0, 1 / deviation), int(counted))


def assign_folds(labels: Tensor, seed: int) -> Tensor:
    """Assign pictures with these labels, as `Loader.labels`, to folds at random: int64 (n,), 0 to `FOLDS` - 1.

    Folds are stratified: their numbers of pictures of a class differ by one at most. The only picture of a
    class is in fold -1, which is never held out, because nothing could be learned of this class without it.
    Where pictures may have several classes, those with the same ones are spread over the folds.
    """
    shuffled = torch.randperm(len(labels), generator=generator("folds", seed))
    if labels.ndim == 2:
        folds = torch.full((len(labels),), -1)
        sets = labels.unique(dim=0, return_inverse=True)[1]
        if len(labels) > 1:
            folds[shuffled[sets[shuffled].argsort(stable=True)]] = torch.arange(len(labels)) % FOLDS
        return folds
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.empty_like(labels)
    alone = labels.bincount()[labels] == 1
    by_class = by_class[~alone[by_class]]
    folds[by_class] = torch.arange(len(by_class)) % FOLDS
    folds[alone] = -1
    return folds


def objective(
    inputs: Tensor,
    labels: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    bias: Tensor,
    having: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the weighted cross-entropy of k problems side by side, and its derivatives.

    Args:
        inputs: float (n, d).
        labels: int64 (n,), or (n, classes), as in `Part`.
        weights: float (n, k), the samples' weights in each problem.
        coefficients: float (d, k * classes).
        bias: float (k * classes,).
        having: What having a class weighs, where a picture may have several, float64 (classes,); else None.

    Returns:
        The sums of the losses (k,), and their derivatives by `coefficients` and by `bias`.
    """
    count, problems = weights.shape
    scores = F.linear(inputs, coefficients.T.contiguous(), bias).view(count, problems, -1)
    if having is not None:
        # In float32, losses of pictures with equal scores round alike, and steps are lost in it.
        scores = scores.double()
        targets = labels.to(scores.dtype)[:, None].expand(scores.shape)
        each = torch.where(targets > 0, having, 1.0) * weights[:, :, None]
        losses = F.binary_cross_entropy_with_logits(scores, targets, each, reduction="none").sum(2)
        flat = ((scores.sigmoid() - targets) * each).view(count, -1)
        return losses.sum(0), (flat.to(inputs.dtype).T @ inputs).T, flat.sum(0)
    residuals = scores.log_softmax(2)
    target = labels.view(count, 1, 1).expand(count, problems, 1)
    losses = -(residuals.gather(2, target).squeeze(2) * weights).sum(0, dtype=torch.float64)
    residuals.exp_().scatter_add_(2, target, residuals.new_full((), -1.0).expand(target.shape))
    flat = residuals.mul_(weights[:, :, None]).view(count, -1)
    # With few columns, five times as fast on a CPU as `inputs.T @ flat`.
    return losses, (flat.T @ inputs).T, flat.sum(0, dtype=torch.float64)


class Problems:
    """Problems of logistic regression over the same samples, which differ in the samples' weights.

    A solution is a float64 tensor (d + 1, problems, classes), whose last row is the bias. The problems are
    solved as one, whose objective is their sum, so a pass over the samples serves all of them.
    """

    def __init__(
        self,
        passes: Passes,
        rank: int,
        after_pass: Callable[[], None],
        having: Tensor | None = None,
    ) -> None:
        """Describe the samples.

        Args:
            passes: Begins a pass over this worker's samples, whose inputs are standardized.
            rank: This worker's rank.
            after_pass: Called on all workers after each evaluation of the objective.
            having: As in `objective`.
        """
        self._passes, self._having = passes, having
        self._rank, self._after_pass = rank, after_pass
        self.passes = 0

    def solve(self, start: Tensor, weigh: Weigh, penalty: float, tolerance: float) -> Tensor:
        """Minimize the objective. All workers must call this, and all get the same solution.

        Args:
            start: Where to begin.
            weigh: The weights of samples, whose sum over all samples should be 1 in each problem.
            penalty: The penalty on half the squared weights.
            tolerance: The largest derivative to end with.
        """
        # One number more than the solution: whether there is another pass.
        at = torch.cat([start.flatten(), start.new_ones(1)])

        def evaluate() -> tuple[float, Tensor]:
            return self._evaluate(at[:-1].view(start.shape), weigh, penalty)

        def tell(values: Tensor, more: bool) -> None:
            at[:-1] = values
            at[-1] = float(more)
            broadcast(at)

        if self._rank == 0:
            point = start.flatten().clone().requires_grad_()

            @torch.no_grad()
            def closure() -> float:
                tell(point, True)
                loss, gradient = evaluate()
                point.grad = gradient.flatten()
                return loss

            optimizer = torch.optim.LBFGS(
                [point],
                max_iter=_MOST_STEPS,
                history_size=10,
                tolerance_grad=tolerance,
                # In float32, steps that gain less than 1e-8 are noise, on which its search would find nothing.
                tolerance_change=(1e-3 if self._having is None else 1e-5) * tolerance,
                line_search_fn="strong_wolfe",
            )
            optimizer.step(closure)
            tell(point.detach(), False)
        else:
            while broadcast(at)[-1] > 0:
                evaluate()
        return at[:-1].view(start.shape)

    def _evaluate(self, at: Tensor, weigh: Weigh, penalty: float) -> tuple[float, Tensor]:
        """Compute the objective and its gradient over the samples of all workers."""
        sums = torch.zeros(at.numel() + 1, dtype=torch.float64, device=at.device)
        loss, gradient = sums[-1], sums[:-1].view(len(at), -1)
        for part, coefficients, bias in self._portions(at):
            weights = weigh(part).to(part.inputs.dtype)
            losses, by_coefficients, by_bias = objective(
                part.inputs, part.labels, weights, coefficients, bias, self._having
            )
            loss += losses.sum()
            gradient[:-1] += by_coefficients
            gradient[-1] += by_bias
        sum_over_workers(sums)
        gradient = gradient.view(at.shape)
        gradient[:-1] += penalty * at[:-1]
        self.passes += 1
        self._after_pass()
        return float(loss + penalty / 2 * at[:-1].square().sum()), gradient

    def count(self, at: Tensor, weigh: Weigh) -> tuple[float, int, int]:
        """Count predictions for pictures as they are, where `weigh` is not 0.

        All workers must call this.

        Returns:
            The weighted mean loss, of several classes the mean over them; the number of correct predictions;
            and the number of predictions.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=at.device)
        for part, coefficients, bias in self._portions(at):
            if part.first:
                weights = weigh(part)
                counted = weights > 0
                scores = torch.addmm(bias, part.inputs, coefficients).view(*counted.shape, -1)[counted]
                several = part.labels.ndim == 2
                labels = part.labels[:, None].expand(*counted.shape, *part.labels.shape[1:])[counted]
                losses = self._losses(scores.double(), labels)
                loss = (losses * weights[counted]).sum()
                right = correct(scores, labels, multilabel=several).sum()
                sums += torch.stack([loss, right.double(), counted.sum().double(), weights.sum().double()])
        loss_sum, correct_ones, total, weight = sum_over_workers(sums).tolist()
        return loss_sum / (weight or 1), int(correct_ones), int(total)

    def _losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each sample (n,), of several classes the mean over them."""
        if labels.ndim == 1:
            return F.cross_entropy(scores, labels, reduction="none")
        targets = labels.to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores, targets, pos_weight=self._having, reduction="none")
        return losses.mean(1)

    def _portions(self, at: Tensor) -> Iterable[tuple[Part, Tensor, Tensor]]:
        """Yield samples, and the solution (coefficients and bias) in the dtype of their inputs."""
        size = max(_SCORES // at[0].numel(), 1)
        solution = at.flatten(1)
        for part in self._passes():
            solution = solution.to(part.inputs.dtype)
            for start in range(0, len(part.labels), size):
                rows = slice(start, start + size)
                some = Part(part.inputs[rows], part.labels[rows], part.rows[rows], part.first)
                yield some, solution[:-1], solution[-1]


@dataclass(frozen=True)
class Fit:
    """A classifier at its optimum.

    Attributes:
        weight: float64 (classes, d), for inputs as they are.
        bias: float64 (classes,).
        penalty: The chosen penalty; the middle one if no picture can be held out.
        path: What each penalty that was tried made of held-out pictures.
        folds: How often pictures were held out: 1, or `FOLDS` for cross-validation, or 0 if no class has two.
        loss: Mean cross-entropy (`Problems.count`) of the training pictures, without other views.
        correct: How many of them are classified correctly.
        passes: Number of evaluations of the objective.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    path: Sequence[HeldOut]
    folds: int
    loss: float
    correct: int
    passes: int


def fit(
    passes: Passes,
    labels: Tensor,
    classes: int,
    inputs: int,
    *,
    rank: int = 0,
    device: torch.device,
    seed: int = 0,
    memory: float = 0.0,
    penalties: Sequence[float] = PENALTIES,
    tolerance: float = _FINE,
    class_weights: Tensor | None = None,
    after_pass: Callable[[str, int], None] = lambda what, passes: None,
) -> Fit:
    """Choose the penalty and solve for the classifier. All workers must call this, and all get the same.

    Args:
        passes: Begins a pass over this worker's samples.
        labels: The labels of all training pictures on the CPU, as `Loader.labels` returns them.
        classes: Number of classes.
        inputs: Number of inputs d.
        rank: This worker's rank.
        device: Where the samples are.
        seed: Seed of the choice of held-out pictures.
        penalties: Penalties to choose from, in the order in which they are tried. A single one is just used.
        tolerance: The largest derivative of the objective that the solution may have.
        class_weights: The weight of each class's samples, float64 (classes,); of several classes, that of
            having the class. None: all weigh the same.
        memory: Bytes that this worker may take to keep its samples. If they need more, each pass reads them
            again.
        after_pass: Called on all workers after each pass, with what is being computed and how many passes were
            made.
    """
    scaling = measure_scaling(passes, inputs, device)
    standardized = _standardized(passes, scaling, memory)
    doing = ""

    def tell() -> None:
        after_pass(doing, problems.passes)

    several = labels.ndim == 2
    having = None
    if several:
        having = torch.ones(classes, dtype=torch.float64) if class_weights is None else class_weights
        having = having.to(device)
    problems = Problems(standardized, rank, tell, having)
    assigned = assign_folds(labels, seed).to(device)
    many = len(labels) > CROSS_VALIDATED or FOLDS * classes * inputs > _MOST_WEIGHTS
    folds = 1 if many else FOLDS
    if len(penalties) == 1 or bool((assigned < 0).all()):
        folds = 0

    # What each picture weighs.
    of_picture = torch.ones(len(labels), dtype=torch.float64)
    if not several and class_weights is not None:
        of_picture = class_weights[labels]
    of_picture = of_picture.to(device)

    def held_out(part: Part) -> Tensor:
        return assigned[part.rows, None] == torch.arange(folds, device=device)

    def weigh(part: Part) -> Tensor:
        return of_picture[part.rows, None]

    # The weights of the samples outside each fold, and of all samples. Each picture has as many views.
    views = scaling.count // len(labels)
    outside = views * torch.stack([of_picture[assigned != fold].sum() for fold in range(max(folds, 1))])
    whole = views * of_picture.sum()

    at = torch.zeros(inputs + 1, max(folds, 1), classes, dtype=torch.float64, device=device)
    path: list[HeldOut] = []
    best: HeldOut | None = None
    best_at, since = at.mean(1, keepdim=True), 0
    for number, penalty in enumerate(penalties if folds else ()):
        doing = f"penalty {penalty:.2g} ({number + 1} of {len(penalties)})"
        at = problems.solve(at, lambda part: ~held_out(part) * weigh(part) / outside, penalty, _COARSE)
        held = HeldOut(penalty, *problems.count(at, lambda part: held_out(part) * weigh(part)), problems.passes)
        path.append(held)
        since += 1
        if best is None or max(held.loss, _TIE) < best.loss - _TIE:
            best, best_at, since = held, at.mean(1, keepdim=True), 0
        if since == _PATIENCE:
            break
    penalty = best.penalty if best else penalties[len(penalties) // 2]
    doing = f"penalty {penalty:.2g}, all pictures"
    solution = problems.solve(best_at, lambda part: weigh(part) / whole, penalty, tolerance)
    loss, correct, _ = problems.count(solution, weigh)
    folded = scaling.fold(solution[:-1, 0], solution[-1, 0])
    return Fit(*folded, penalty, tuple(path), folds, loss, correct, problems.passes)


def _standardized(passes: Passes, scaling: Scaling, memory: float) -> Passes:
    """Return passes over standardized samples, which are kept if this worker has the memory for them."""

    def read() -> Iterable[Part]:
        return (dataclasses.replace(part, inputs=scaling.apply(part.inputs)) for part in passes())

    if sum(part.inputs.nbytes for part in passes()) > memory:
        return read
    kept = list(read())
    return lambda: kept
