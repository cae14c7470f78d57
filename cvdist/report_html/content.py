"""What a report shows. Whoever has a run's results fills it in; what is unknown stays empty and is left out."""

from __future__ import annotations

from dataclasses import dataclass

from cvdist.results import EpochRecord, RidgeResult


@dataclass(frozen=True)
class Picture:
    """A figure's file.

    path: `loss.png` or `filters/features.0.png`, below the run's figures; it says what the figure shows.
    data: PNG, GIF, JPEG, WebP or SVG.
    """

    path: str
    data: bytes


@dataclass(frozen=True)
class Setting:
    """A parameter, and what the recipe has for it; `usual` is None where the recipe is not known."""

    group: str
    name: str
    value: str
    usual: str | None = None

    @property
    def changed(self) -> bool:
        """Whether it differs from the recipe's."""
        return self.usual is not None and self.usual != self.value


@dataclass(frozen=True)
class Data:
    """What was learned from. `shape` is that of one picture, channels first: `3x224x224`."""

    name: str
    source: str = ""
    shape: str = ""
    classes: tuple[str, ...] = ()
    train_size: int = 0
    valid_size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Model:
    """What was trained: numbers of parameters, and the pretrained weights it began from, if any."""

    name: str
    trained: int = 0
    frozen: int = 0
    weights: str = ""
    weights_sha256: str = ""
    normalisation: str = ""


@dataclass(frozen=True)
class Report:
    """A run.

    status: empty for one that has finished, else `failed`, `killed` or `running`.
    started: a date and time, as text. first_step_seconds: from the job's start to the end of its first step.
    left_out: a line for each thing that the run has and the report doesn't.
    """

    name: str
    status: str = ""
    recipe: str = ""
    command: str = ""
    started: str = ""
    address: tuple[tuple[str, str], ...] = ()
    """Where the run is kept: name and value."""
    data: Data | None = None
    model: Model | None = None
    workers: int = 0
    hardware: str = ""
    precision: str = ""
    epochs: tuple[EpochRecord, ...] = ()
    first_step_seconds: float | None = None
    ridge: RidgeResult | None = None
    """The baseline of a run from a cache of features."""
    settings: tuple[Setting, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """Parameters that no one has set: what the job found at its start."""
    versions: tuple[tuple[str, str], ...] = ()
    quarantine: tuple[tuple[str, str], ...] = ()
    """Path and reason of each picture that can't be decoded."""
    pictures: tuple[FigureFile, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with most validation pictures right; of equals the first, as the training loop has it."""
        return max(self.epochs, key=lambda record: (record.valid_correct, -record.epoch), default=None)
