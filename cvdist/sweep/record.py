"""The state of a sweep and its trials, stored beside the checkpoints, from which a sweep is resumed.

`<run>/sweep.json` holds the search space, `<run>/trials/0007.json` the results of trial 7. Ray Tune's own state
is not used, since it is pickled and loses what early stopping has seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder
from cvdist.sweep.space import Settings

_PLAN = "sweep.json"
_FORMAT = 1

ONE_CLASS_NEEDED = (
    "a sweep compares trials by accuracy, and these pictures may have several classes: compare runs of python "
    "jobs/train.py"
)

TrialState = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
"""`finished`: all epochs are done; `stopped`: stopped early for low accuracy; `diverged`: loss or weights
became infinite or NaN; `failed`: failed for another reason, and retried when the sweep is resumed."""
END_STATES: tuple[TrialState, ...] = ("finished", "stopped", "diverged")


@dataclass(frozen=True)
class TrialEpoch:
    """Validation results of a trial after one epoch.

    Attributes:
        epoch: The epoch, from 1.
        correct: How many pictures were classified correctly.
        total: How many pictures were classified.
        loss: Mean loss.
    """

    epoch: int
    correct: int
    total: int
    loss: float

    @property
    def score(self) -> float:
        """Number of correct pictures, plus a value in [0, 1] that breaks ties: greater for a lower loss."""
        return self.correct + (1 / (1 + self.loss) if self.loss >= 0 else 0.0)


@dataclass(frozen=True)
class Trial:
    """The state of one trial.

    Attributes:
        number: Number of the trial, from 1.
        settings: Its values of the searched settings.
        state: Its state.
        epochs: Its results, in order.
        reason: Why it diverged or failed.
        seconds: Time until its last result, summed over all attempts.
    """

    number: int
    settings: Settings
    state: TrialState = "waiting"
    epochs: tuple[TrialEpoch, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def best(self) -> TrialEpoch | None:
        """The epoch with the most correct pictures, and among equals the first: that of the best checkpoint."""
        return max(self.epochs, key=lambda epoch: epoch.correct, default=None)

    @property
    def score(self) -> float:
        """Score of the best epoch, to compare trials by; -1 without an epoch."""
        return self.best.score if self.best is not None else -1.0

    def after(self, epochs: int) -> TrialEpoch | None:
        """Return the best of the first `epochs` epochs, or None if the trial has not reached that epoch."""
        if not self.epochs or self.epochs[-1].epoch < epochs:
            return None
        return max((one for one in self.epochs if one.epoch <= epochs), key=lambda one: one.correct)

    def with_epoch(self, epoch: TrialEpoch, seconds: float) -> Trial:
        """Return the trial with one more result.

        The result replaces that of the same epoch and of later ones.
        """
        before = tuple(one for one in self.epochs if one.epoch < epoch.epoch)
        return dataclasses.replace(self, state="running", epochs=(*before, epoch), seconds=seconds)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """Return the finished trial with the highest score, the first among equals; None if none has finished."""
    return max((one for one in trials if one.state == "finished"), key=lambda one: one.score, default=None)


class TrialStore:
    """The files of one sweep, in the folder of its run."""

    def __init__(self, folder: Folder) -> None:
        """Use `folder`, the folder of the run."""
        self._folder = folder

    def begin(self, plan: dict[str, Any]) -> bool:
        """Store the search space, or compare it with the stored one.

        Args:
            plan: The search space and the settings that have to stay the same when the sweep is resumed.

        Returns:
            Whether the sweep resumes an earlier job.

        Raises:
            UserError: If the earlier job had another plan, or the folder is that of a training run.
        """
        content = self._folder.find(_PLAN)
        if content is None:
            if any(name.endswith("checkpoint.json") for name in self._folder.sizes()):
                raise UserError(
                    f"{redact(self._folder.uri)} holds a training of this --name: give the sweep another one"
                )
            self._folder.write(_PLAN, json.dumps({"format": _FORMAT, **plan}, indent=1).encode())
            return False
        before = _load(content, _PLAN)
        if before.get("format") != _FORMAT:
            raise UserError(
                "the sweep of this --name is in the format of another version: give this one another --name"
            )
        now = json.loads(json.dumps(plan))
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed:
            raise UserError(
                "the sweep of this --name was started with other settings: "
                + "; ".join(f"{name} {_short(before.get(name))}, now {_short(plan[name])}" for name in changed)
                + ". Start it with the same flags, or give this one another --name"
            )
        return True

    def read(self, tries: Sequence[Settings]) -> list[Trial]:
        """Read the state of all trials.

        Args:
            tries: The settings of all trials, in order of their numbers.

        Returns:
            The trials. Those that no earlier job has started are in the state `waiting`.

        Raises:
            UserError: If a file can't be read.
        """
        trials = []
        for number, settings in enumerate(tries, start=1):
            content = self._folder.find(_name(number))
            trials.append(_parse(content, number, settings) if content else Trial(number, settings))
        return trials

    def write(self, trial: Trial) -> None:
        """Store the state of a trial.

        Raises:
            UserError: If the storage can't be written.
        """
        self._folder.write(_name(trial.number), json.dumps(dataclasses.asdict(trial), indent=1).encode())


def folder_of(number: int) -> str:
    """Return the name of the folder of a trial's checkpoints, below the run's folder."""
    return f"trial-{number:02}"


def _name(number: int) -> str:
    return f"trials/{number:04}.json"


def _load(content: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{name} of this sweep is damaged: delete it, or give the sweep another --name")
    return values


def _parse(content: bytes, number: int, settings: Settings) -> Trial:
    values = _load(content, _name(number))
    epochs = tuple(TrialEpoch(**one) for one in values["epochs"])
    return Trial(number, settings, values["state"], epochs, values["reason"], values["seconds"])


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text or "none"
