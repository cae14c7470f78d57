"""The content of a report as dataclasses.

Fields that are not known stay empty, and the page leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cvdist.results import EpochRecord, RidgeResult


@dataclass(frozen=True)
class FigureFile:
    """The image file of a figure.

    Attributes:
        path: Path below the run's `figures/` folder, such as `loss.png` or `filters/features.0.png`. It tells
            what the figure shows.
        data: Content of the file, in PNG, GIF, JPEG, WebP or SVG.
    """

    path: str
    data: bytes


@dataclass(frozen=True)
class Setting:
    """A setting of the run.

    Attributes:
        group: Title of the group that it is shown in, such as `optimizer`.
        name: Name of the setting in the group.
        value: Value of the run, as text.
        recipe_value: Value of the recipe, as text. None if it is not known.
    """

    group: str
    name: str
    value: str
    recipe_value: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the value differs from the recipe's. False if that is not known."""
        return self.recipe_value is not None and self.recipe_value != self.value


@dataclass(frozen=True)
class Report:
    """All that a report shows of a run.

    Attributes:
        name: Name of the run.
        status: Empty for a run that has finished, else `failed`, `killed` or `running`.
        subject: Model and data in a few words.
        started: Date and time of the start, as text.
        command: Command that started the run.
        recipe: Name of the recipe.
        trained: Names and values that tell what was trained: data, model, workers, precision.
        epochs: Results of all epochs, in order.
        first_step_seconds: Seconds from the start of the job to the end of its first step.
        ridge: Result of the ridge probe, the baseline of a run that trains from cached features.
        settings: All settings, and what the job found out at its start, ordered by groups.
        environment: Names and values that tell where and with which software the run was made.
        quarantine: Path and reason of each picture that can't be decoded.
        classes: Where a picture may have several, for each class: its name, validation pictures, average
            precision, threshold, precision, recall and F1, as text.
        pictures: The image files of the figures.
        left_out: One line for each part of the run that the report does not show.
    """

    name: str
    status: str = ""
    subject: str = ""
    started: str = ""
    command: str = ""
    recipe: str = ""
    trained: Mapping[str, str] = field(default_factory=dict)
    epochs: tuple[EpochRecord, ...] = ()
    first_step_seconds: float | None = None
    ridge: RidgeResult | None = None
    settings: tuple[Setting, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    quarantine: tuple[tuple[str, str], ...] = ()
    classes: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[FigureFile, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def multilabel(self) -> bool:
        """Whether a picture may have several classes."""
        return any(record.valid_mean_average_precision is not None for record in self.epochs)

    @property
    def best(self) -> EpochRecord | None:
        """The best epoch by what the run selects by, and among equals the first one."""
        return max(self.epochs, key=lambda record: record.score, default=None)
