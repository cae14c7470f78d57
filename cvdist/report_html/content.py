"""The content of a report as dataclasses.

Fields that are not known stay empty, and the page leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        group: Name of the settings group, such as `optimizer`.
        name: Name of the setting in the group.
        value: Value of the run, as text.
        recipe_value: Value of the recipe, as text. None if the recipe is not known.
    """

    group: str
    name: str
    value: str
    recipe_value: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the value differs from the recipe's. False if the recipe is not known."""
        return self.recipe_value is not None and self.recipe_value != self.value


@dataclass(frozen=True)
class DataSummary:
    """The data set of the run.

    Attributes:
        name: Name of the data set.
        source: Folder or URI that it was read from.
        shape: Shape of one picture, channels first, such as `3x224x224`.
        classes: Class names.
        train_size: Number of training pictures.
        valid_size: Number of validation pictures.
        sha256: Digest of the data.
    """

    name: str
    source: str = ""
    shape: str = ""
    classes: tuple[str, ...] = ()
    train_size: int = 0
    valid_size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class ModelSummary:
    """The model of the run.

    Attributes:
        name: Name of the architecture.
        trained: Number of trained parameters.
        frozen: Number of frozen parameters.
        weights: Name of the pretrained weights. Empty if training began with random weights.
        weights_sha256: Digest of the pretrained weights.
        normalization: Mean and standard deviation that pixels are normalized with, as text.
    """

    name: str
    trained: int = 0
    frozen: int = 0
    weights: str = ""
    weights_sha256: str = ""
    normalization: str = ""


@dataclass(frozen=True)
class Report:
    """All that a report shows of a run.

    Attributes:
        name: Name of the run.
        status: Empty for a run that has finished, else `failed`, `killed` or `running`.
        recipe: Name of the recipe.
        command: Command that started the run.
        started: Date and time of the start, as text.
        address: Names and values that tell where the run is stored.
        data: The data set.
        model: The model.
        workers: Number of workers.
        hardware: Hardware of a worker, as text.
        precision: Precision of the computation.
        epochs: Results of all epochs, in order.
        first_step_seconds: Seconds from the start of the job to the end of its first step.
        ridge: Result of the ridge probe, the baseline of a run that trains from cached features.
        settings: All settings.
        facts: Names and values of parameters that are not settings, which the job found out at its start.
        versions: Names and versions of the software.
        quarantine: Path and reason of each picture that can't be decoded.
        pictures: The image files of the figures.
        left_out: One line for each part of the run that the report does not show.
    """

    name: str
    status: str = ""
    recipe: str = ""
    command: str = ""
    started: str = ""
    address: tuple[tuple[str, str], ...] = ()
    data: DataSummary | None = None
    model: ModelSummary | None = None
    workers: int = 0
    hardware: str = ""
    precision: str = ""
    epochs: tuple[EpochRecord, ...] = ()
    first_step_seconds: float | None = None
    ridge: RidgeResult | None = None
    settings: tuple[Setting, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    quarantine: tuple[tuple[str, str], ...] = ()
    pictures: tuple[FigureFile, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with the most correct validation pictures, and among equals the first one."""
        return max(self.epochs, key=lambda record: (record.valid_correct, -record.epoch), default=None)
