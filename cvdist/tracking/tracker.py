"""What the training loop tells about a run. Nothing here waits for a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from cvdist.data.dataset import DatasetInfo
    from cvdist.results import ModelIdentity


def _always() -> None:
    """Permit."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run's workers.

    number: counts from 1; ensure_current: raises `Superseded` if a newer attempt has begun.
    """

    number: int = 1
    ensure_current: Callable[[], None] = _always


class Tracker(Protocol):
    """Takes a run's results. One process of a run has a real one, the others `NoTracker`."""

    def log_params(self, values: Mapping[str, object]) -> None:
        """Facts that hold for the whole run."""
        ...

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Measured values at `step`, by names such as `train/loss`; taken once, also over restarts."""
        ...

    def log_dataset(self, info: DatasetInfo, digest: Callable[[], str]) -> None:
        """What the run learns from; `digest` is called off the training's path."""
        ...

    def log_figure(self, name: str, draw: Callable[[], Figure]) -> None:
        """A picture for the artifacts, drawn off the training's path. `name` may have folders."""
        ...

    def log_artifact(self, name: str, make: Callable[[], bytes]) -> None:
        """A file for the artifacts, `figures/filters/forming.gif`, made off the training's path."""
        ...

    def log_text(self, name: str, content: str) -> None:
        """A text file for the artifacts."""
        ...

    def log_model(
        self, model: nn.Module, identity: ModelIdentity, info: DatasetInfo, example: Tensor, step: int
    ) -> None:
        """The model of epoch `step`, ready to serve. Waits. `example`: uint8 pictures (n, C, H, W), n >= 2."""
        ...

    def close(self) -> None:
        """Deliver what is left. Waits, for a bounded time."""
        ...


class NoTracker:
    """Takes everything and keeps nothing."""

    def log_params(self, values: Mapping[str, object]) -> None:
        """See `Tracker`."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""

    def log_dataset(self, info: DatasetInfo, digest: Callable[[], str]) -> None:
        """See `Tracker`."""

    def log_figure(self, name: str, draw: Callable[[], Figure]) -> None:
        """See `Tracker`."""

    def log_artifact(self, name: str, make: Callable[[], bytes]) -> None:
        """See `Tracker`."""

    def log_text(self, name: str, content: str) -> None:
        """See `Tracker`."""

    def log_model(
        self, model: nn.Module, identity: ModelIdentity, info: DatasetInfo, example: Tensor, step: int
    ) -> None:
        """See `Tracker`."""

    def close(self) -> None:
        """See `Tracker`."""
