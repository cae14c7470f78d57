"""Plain result types that several packages share: measurements of a run, and the identity of its model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvdist import log, multilabel
from cvdist.config import HeadSize, SelectBy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EpochRecord:
    """Exact results of one epoch.

    Attributes:
        epoch: The epoch, from 1.
        train_loss: Mean training loss.
        train_correct: How many training pictures were classified correctly. Where a picture may have several
            classes: how many got exactly their classes, at a probability of 0.5.
        train_total: How many training pictures there were.
        valid_loss: Mean validation loss.
        valid_correct: How many validation pictures were classified correctly; where a picture may have several
            classes, at their chosen thresholds.
        valid_total: How many validation pictures there were.
        learning_rate: Learning rate of the epoch.
        seconds: Duration of training and validation.
        samples_per_second: Training samples per second, over all workers.
        peak_memory: Peak memory of rank 0 in bytes.
        slow_requests: Slow and failed storage requests since the previous epoch, over all workers
            (`cvdist.slow_requests`).
        seconds_lost: Seconds that these requests cost, over all workers.
        valid_balanced_accuracy: `balanced_accuracy` of the validation pictures.
        valid_macro_f1: `macro_f1` of the validation pictures.
        select_by: The value that the best epoch is chosen by (`--select-by`).
        valid_mean_average_precision: The mean of the classes' average precisions. None where a picture has one
            class.
    """

    epoch: int
    train_loss: float
    train_correct: int
    train_total: int
    valid_loss: float
    valid_correct: int
    valid_total: int
    learning_rate: float
    seconds: float
    samples_per_second: float
    peak_memory: int = 0
    slow_requests: int = 0
    seconds_lost: float = 0.0
    valid_balanced_accuracy: float = 0.0
    valid_macro_f1: float = 0.0
    select_by: SelectBy = "accuracy"
    valid_mean_average_precision: float | None = None

    @property
    def train_accuracy(self) -> float:
        """Fraction of correct pictures, in [0, 1]."""
        return self.train_correct / self.train_total

    @property
    def valid_accuracy(self) -> float:
        """Fraction of correct pictures, in [0, 1]."""
        return self.valid_correct / self.valid_total

    @property
    def multilabel(self) -> bool:
        """Whether a picture may have several classes."""
        return self.valid_mean_average_precision is not None

    @property
    def selected(self) -> float:
        """The value that the best epoch is chosen by: the higher, the better, so a loss is negative."""
        values = {
            "accuracy": self.valid_accuracy,
            "balanced_accuracy": self.valid_balanced_accuracy,
            "macro_f1": self.valid_macro_f1,
            "mean_average_precision": self.valid_mean_average_precision or 0.0,
            "loss": -self.valid_loss,
        }
        return values[self.select_by]

    @property
    def score(self) -> float:
        """Value from 0 to 1 that checkpoints are compared by: the highest is best, and the first of equals."""
        value = 1 / (1 + self.valid_loss) if self.select_by == "loss" else self.selected
        return (value if math.isfinite(value) else 0.0) - 1e-9 * self.epoch


def spoken(select_by: SelectBy) -> str:
    """Return a value of `--select-by` in words."""
    return select_by.replace("_", " ").replace("f1", "F1")


def by_class(balanced: float, f1: float, average_precision: float | None = None) -> str:
    """Format the values in which all classes count alike, as `balanced accuracy 81.12%, macro F1 0.8034`.

    With an average precision, for pictures that may have several classes, it is `mAP 0.8112, macro F1 0.8034`.
    """
    first = f"balanced accuracy {balanced:.2%}" if average_precision is None else f"mAP {average_precision:.4f}"
    return f"{first}, macro F1 {f1:.4f}"


def correct_of(correct: int, total: int, *, several: bool) -> str:
    """Format how many pictures are right: `81.12% (1246/1536)`, or `1246/1536 exact matches` if `several`."""
    return f"{correct}/{total} exact matches" if several else log.percent(correct, total)


def balanced_accuracy(confusion: Tensor) -> float:
    """Return the mean recall of the classes that have pictures, as scikit-learn's `balanced_accuracy_score`.

    Args:
        confusion: Counts (classes, classes). Rows are true classes.
    """
    right, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    recalls = [one / total for one, total in zip(right, totals, strict=True) if total]
    return sum(recalls) / max(len(recalls), 1)


def macro_f1(confusion: Tensor) -> float:
    """Return the mean F1 score of the classes that have pictures.

    Args:
        confusion: Counts (classes, classes). Rows are true classes.
    """
    right, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    columns = zip(right, totals, confusion.sum(0).tolist(), strict=True)
    scores = [2 * one / (total + taken) for one, total, taken in columns if total]
    return sum(scores) / max(len(scores), 1)


@dataclass(frozen=True)
class RidgeResult:
    """Validation results of a ridge probe (`cvdist.training.ridge`).

    Attributes:
        correct: How many pictures were classified correctly.
        total: How many pictures were classified.
        penalty: The chosen penalty on the squared weights.
        seconds: Duration of fitting and evaluation.
        mean_average_precision: The mean of the classes' average precisions. None where a picture has one class.
    """

    correct: int
    total: int
    penalty: float
    seconds: float
    mean_average_precision: float | None = None

    def __str__(self) -> str:
        """Format the result as `98.50% (394/400) in 1.2 s`, or `mAP 0.8112 in 1.2 s`."""
        several = self.mean_average_precision is not None
        result = f"mAP {self.value:.4f}" if several else log.percent(self.correct, self.total)
        return f"{result} in {self.seconds:.1f} s"

    @property
    def accuracy(self) -> float:
        """Fraction of correct pictures, in [0, 1]."""
        return self.correct / self.total

    @property
    def select_by(self) -> SelectBy:
        """Kind of value by which a model is compared with the probe."""
        return "accuracy" if self.mean_average_precision is None else "mean_average_precision"

    @property
    def value(self) -> float:
        """Value of the probe that `select_by` names."""
        return self.accuracy if self.mean_average_precision is None else self.mean_average_precision


@dataclass(frozen=True)
class HeldOut:
    """The result of a penalty of logistic regression on training pictures that were held out.

    Attributes:
        penalty: The penalty on half the squared weights.
        loss: Mean cross-entropy.
        correct: How many pictures were classified correctly.
        total: How many pictures were classified.
        passes: Passes over the samples from the start of the fit to here.
    """

    penalty: float
    loss: float
    correct: int
    total: int
    passes: int

    @property
    def accuracy(self) -> float:
        """Fraction of correct pictures, in [0, 1]."""
        return self.correct / self.total


@dataclass(frozen=True)
class LogisticResult:
    """Result of fitting a head by logistic regression (`cvdist.training.logistic_head`).

    Attributes:
        epoch: The epoch that the fit counts as, from 1.
        penalty: The chosen penalty.
        folds: How often training pictures were held out: 5 for cross-validation, 1, or 0 if no class has two.
        path: Result on held-out pictures of each penalty that was tried.
        seconds: Duration of the fit.
        multilabel: Whether a picture may have several classes, each with a regression of its own.
    """

    epoch: int
    penalty: float
    folds: int
    path: Sequence[HeldOut]
    seconds: float
    multilabel: bool = False

    def __str__(self) -> str:
        """Format as `penalty 0.1, 81.12% (1246/1536) of held-out training pictures (5 folds), in 12.1 s`."""
        held = next((held for held in self.path if held.penalty == self.penalty), None)
        how = "5 folds" if self.folds > 1 else "a fifth of them"
        right = "not chosen: no class has two pictures"
        if held:
            correct = correct_of(held.correct, held.total, several=self.multilabel)
            right = f"{correct} of held-out training pictures ({how})"
        return f"penalty {self.penalty:.2g}, {right}, in {self.seconds:.1f} s"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogisticResult:
        """Create a result from the dictionary that `dataclasses.asdict` returned."""
        return cls(**{**values, "path": tuple(HeldOut(**held) for held in values["path"])})


@dataclass(frozen=True)
class Mistake:
    """A wrongly classified picture.

    Attributes:
        index: Row of the picture in the data set.
        true: Numbers of its classes: one, several or none.
        predicted: Numbers of the predicted classes.
        confidence: Probability of the predicted class, in [0, 1]. Where a picture may have several classes, the
            sum over the wrong ones of the distance between probability and threshold.
    """

    index: int
    true: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: float


@dataclass(frozen=True)
class LabelResults:
    """How well each class was recognized where a picture may have several. All tensors are on the CPU.

    Attributes:
        average_precision: float64 (classes,); NaN for a class that no picture has.
        thresholds: The probability from which on a picture is said to have the class, float64 (classes,).
        counts: Counts of predictions at these thresholds.
        curves: Precision by recall, float32 (classes, 101), from `multilabel.precision_at_recall`.
    """

    average_precision: Tensor
    thresholds: Tensor
    counts: multilabel.Counts
    curves: Tensor

    @property
    def mean_average_precision(self) -> float:
        """Mean average precision of the classes that have pictures."""
        return multilabel.mean(self.average_precision)


@dataclass(frozen=True)
class Evaluation:
    """Results over all validation samples.

    Attributes:
        loss: Mean cross-entropy; where a picture may have several classes, binary and averaged over them.
        correct: How many samples were classified correctly.
        total: How many samples there are.
        confusion: Confusion matrix, int64 (classes, classes) on the CPU. Rows are true classes. None where a
            picture may have several.
        mistakes: The mistakes with the highest confidence, most confident first; or the most wrong classes.
        labels: How well each class was recognized where a picture may have several, else None.
    """

    loss: float
    correct: int
    total: int
    confusion: Tensor | None
    mistakes: list[Mistake]
    labels: LabelResults | None = None


@dataclass(frozen=True)
class CalibrationBin:
    """The pictures whose confidence is in (low, high].

    Attributes:
        low: Lower end of the bin, in [0, 1].
        high: Upper end of the bin, in [0, 1].
        total: How many pictures are in the bin.
        correct: How many of them were classified correctly.
        confidence: Their mean confidence, in [0, 1].
    """

    low: float
    high: float
    total: int
    correct: int
    confidence: float

    @property
    def accuracy(self) -> float:
        """Fraction of correct pictures, in [0, 1]; 0 for an empty bin."""
        return self.correct / self.total if self.total else 0.0


@dataclass(frozen=True)
class ModelIdentity:
    """Everything that has to be equal for weights to fit a model.

    Attributes:
        name: Name of the architecture.
        classes: Class names.
        channels: Channels of a picture.
        height: Height of a picture in pixels.
        width: Width of a picture in pixels.
        head: Kind of the classifier (`cvdist.models.heads`). Empty for models without a choice of heads.
        hidden_size: Size of the head's hidden layers. 0 for models without a choice of heads.
        features_at: What the head reads, `pooled` or `maps`. Empty for models without a choice of heads.
        multilabel: Whether a picture may have several classes, so that each class has a probability of its own,
            the sigmoid of its score.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    head: str = ""
    hidden_size: int = 0
    features_at: str = ""
    multilabel: bool = False

    def __str__(self) -> str:
        """Format the identity for error messages."""
        usual = (self.features_at, self.head) in (("", ""), ("pooled", "linear"))
        head = "" if usual else f", {HeadSize(self.head, self.hidden_size)} on {self.features_at}"
        classes = f"{len(self.classes)} classes" + ", several a picture" * self.multilabel
        return f"{self.name}{head} ({classes}, {self.channels}x{self.height}x{self.width})"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIdentity:
        """Create an identity from the result of `dataclasses.asdict`, also after a round trip through JSON."""
        return cls(**{**values, "classes": tuple(values["classes"])})


@dataclass(frozen=True)
class Summary:
    """Summary of a finished run, for the person who started it.

    Attributes:
        data: Description of the data.
        model: Description of the model.
        workers: Number of workers.
        hardware: Hardware of a worker.
        epochs: Number of epochs.
        best: Results of the best epoch, by its `select_by`.
        samples_per_second: Training samples per second.
        train_seconds: Duration of all epochs.
        first_step_at: When the first step was done, in seconds since 1970. 0 if the run had nothing left to do.
        visualized: Whether the run has figures of what the network has learned.
        slow_requests: Slow and failed storage requests, over all workers.
        seconds_lost: Seconds that these requests cost, over all workers.
        ridge: Result of the ridge probe, if one was computed.
        logistic: How the head was fitted by logistic regression, if it was.
        stopped: Why the run ended before its last epoch. Empty if it did not.
    """

    data: str
    model: str
    workers: int
    hardware: str
    epochs: int
    best: EpochRecord
    samples_per_second: float
    train_seconds: float
    first_step_at: float
    visualized: bool = False
    slow_requests: int = 0
    seconds_lost: float = 0.0
    ridge: RidgeResult | None = None
    logistic: LogisticResult | None = None
    stopped: str = ""

    @property
    def multilabel(self) -> bool:
        """Whether a picture may have several classes."""
        return self.best.multilabel

    @property
    def result(self) -> str:
        """Result of the best epoch, such as `98.94% (9894/10000)`, or `mAP 0.8112, 61/100 exact matches`."""
        precision = self.best.valid_mean_average_precision
        first = "" if precision is None else f"mAP {precision:.4f}, "
        return first + correct_of(self.best.valid_correct, self.best.valid_total, several=self.multilabel)

    @property
    def heading(self) -> str:
        """Name of the result: `best accuracy`, unless the best epoch is chosen by something else."""
        name = "result" if self.multilabel else "accuracy"
        return f"best {name}" if self.best.select_by == self._usual else name

    @property
    def outcome(self) -> str:
        """Result and its epoch, such as `98.94% (9894/10000) at epoch 3`."""
        fitted = self.logistic is not None and self.best.epoch == self.logistic.epoch
        by = "by logistic regression" if fitted else f"at epoch {self.best.epoch}"
        chosen = "" if self.best.select_by == self._usual else f", the best {spoken(self.best.select_by)}"
        return f"{self.result} {by}{chosen}"

    @property
    def _usual(self) -> SelectBy:
        return "mean_average_precision" if self.multilabel else "accuracy"

    @property
    def by_class(self) -> str:
        """Further results of the best epoch in which all classes count alike."""
        if self.multilabel:
            return f"macro F1 {self.best.valid_macro_f1:.4f} at the thresholds of the classes"
        return by_class(self.best.valid_balanced_accuracy, self.best.valid_macro_f1)

    @property
    def below_baseline(self) -> str:
        """Advice on what to try if the model is worse than its baseline; empty if it is not."""
        if self.ridge is None or self.best.select_by != self.ridge.select_by:
            return ""
        reached = self.best.valid_mean_average_precision
        if reached is None:
            more = self.ridge.correct - self.best.valid_correct
            worse = f"the model has {more} more mistake{'s' * (more > 1)} than the ridge probe"
        else:
            worse = f"the model's mAP {reached:.4f} is below the ridge probe's {self.ridge.value:.4f}"
            more = self.ridge.value > reached
        if more <= 0:
            return ""
        return worse if self.logistic else f"{worse}: try --head linear --fit logistic with the rest as it is"
