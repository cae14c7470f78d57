"""The interface through which jobs log the results of a run. Logging does not wait for a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from cvdist.checkpoints.format import Normalization
    from cvdist.data.dataset import DatasetInfo
    from cvdist.results import ModelIdentity


def _always_current() -> None:
    """Do nothing: there is no other attempt."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run: its workers are started again after a failure.

    Attributes:
        number: Number of the attempt, from 1.
        ensure_current: Raises `Superseded` if a newer attempt has begun.
    """

    number: int = 1
    ensure_current: Callable[[], None] = _always_current


class Tracker:
    """The interface of trackers, which log the results of a run. This one logs nothing."""

    def log_params(self, values: Mapping[str, object]) -> None:
        """Log parameters, which hold for the whole run."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics at `step`, by names such as `train/loss`, with the present time.

        Each step is logged once, even across restarts.
        """

    def log_dataset(self, info: DatasetInfo, digest: Callable[[], str]) -> None:
        """Log the data set. `digest` returns its digest, and is called in the background."""

    def log_figure(self, name: str, draw: Callable[[], Figure]) -> None:
        """Log a figure as `figures/NAME.png`.

        `draw` is called in the background. `name` may contain folders.
        """

    def log_artifact(self, name: str, make: Callable[[], bytes]) -> None:
        """Log a file under its path, such as `figures/filters/forming.gif`.

        `make` is called in the background.
        """

    def log_text(self, name: str, content: str) -> None:
        """Log a text file."""
        self.log_artifact(name, content.encode)

    def log_model(
        self,
        model: nn.Module,
        identity: ModelIdentity,
        normalization: Normalization,
        precision: str,
        example: Tensor,
        step: int,
        thresholds: Sequence[float] = (),
    ) -> None:
        """Log the model in a form that can be served, and wait until it is delivered.

        Args:
            model: The model.
            identity: Architecture, classes and input shape of the model.
            normalization: How pictures are normalized and resized.
            precision: The precision that it was trained in.
            example: Input example, uint8 (n, C, H, W), n >= 2.
            step: The epoch that the model is from.
            thresholds: With several labels per picture, the least probability of each class.
        """

    def close(self) -> None:
        """Deliver everything that is pending, and wait for that for a bounded time."""


class NoTracker(Tracker):
    """A tracker that logs nothing."""
