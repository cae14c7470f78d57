"""What became of each trial: small files beside the checkpoints, from which a sweep goes on.

`<run>/sweep.json` says what is searched, `<run>/trials/0007.json` what trial 7 has reached. They are JSON, not
Ray Tune's own state, which is pickled and forgets what early stopping has seen.
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

State = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
"""`finished`: with all its epochs; `stopped`: early, as too weak; `diverged`: its loss or weights are no finite
numbers any more; `failed`: for another reason, and tried again when the sweep goes on."""
ENDED: tuple[State, ...] = ("finished", "stopped", "diverged")


@dataclass(frozen=True)
class Epoch:
    """Validation after one epoch, exact. loss: the mean."""

    epoch: int
    correct: int
    total: int
    loss: float

    @property
    def score(self) -> float:
        """Pictures that are right; between equals, 0 to 1 for the lower loss."""
        return self.correct + (1 / (1 + self.loss) if self.loss >= 0 else 0.0)


@dataclass(frozen=True)
class Trial:
    """One trial. number: from 1; epochs: in order; seconds: until its last result, over all attempts."""

    number: int
    settings: Settings
    state: State = "waiting"
    epochs: tuple[Epoch, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def best(self) -> Epoch | None:
        """The best epoch, the first of equals: that of the run's best checkpoint."""
        return max(self.epochs, key=lambda epoch: epoch.correct, default=None)

    @property
    def score(self) -> float:
        """Of the best epoch, to compare trials by; below all others without one."""
        return self.best.score if self.best is not None else -1.0

    def after(self, epochs: int) -> Epoch | None:
        """The best of the first `epochs` epochs; None if it has not come that far."""
        if not self.epochs or self.epochs[-1].epoch < epochs:
            return None
        return max((one for one in self.epochs if one.epoch <= epochs), key=lambda one: one.correct)

    def with_epoch(self, epoch: Epoch, seconds: float) -> Trial:
        """With one more result, or the same again."""
        before = tuple(one for one in self.epochs if one.epoch < epoch.epoch)
        return dataclasses.replace(self, state="running", epochs=(*before, epoch), seconds=seconds)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The best one that has finished, the first of equals."""
    return max((one for one in trials if one.state == "finished"), key=lambda one: one.score, default=None)


class Records:
    """The files of one sweep."""

    def __init__(self, folder: Folder) -> None:
        """`folder`: of the run."""
        self._folder = folder

    def begin(self, plan: dict[str, Any]) -> bool:
        """Note what is searched; returns whether the sweep goes on from an earlier job.

        Raises:
            UserError: if that job searched something else, or the name is that of a training.
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
            raise UserError("the sweep of this --name is of another version: give this one another --name")
        now = json.loads(json.dumps(plan))
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed:
            raise UserError(
                "the sweep of this --name was started otherwise: "
                + "; ".join(f"{name} {_short(before.get(name))}, now {_short(plan[name])}" for name in changed)
                + ". Start it with the same flags, or give this one another --name"
            )
        return True

    def read(self, tries: Sequence[Settings]) -> list[Trial]:
        """All trials, with what earlier jobs have reached.

        Raises:
            UserError: if a file can't be read.
        """
        trials = []
        for number, settings in enumerate(tries, start=1):
            content = self._folder.find(_name(number))
            trials.append(_parse(content, number, settings) if content else Trial(number, settings))
        return trials

    def write(self, trial: Trial) -> None:
        """Keep what a trial has reached.

        Raises:
            UserError: if the storage can't be written.
        """
        self._folder.write(_name(trial.number), json.dumps(dataclasses.asdict(trial), indent=1).encode())


def folder_of(number: int) -> str:
    """Where in the run's folder a trial's checkpoints are."""
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
    epochs = tuple(Epoch(**one) for one in values["epochs"])
    return Trial(number, settings, values["state"], epochs, values["reason"], values["seconds"])


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text or "none"
