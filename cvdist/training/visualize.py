"""Pictures of what a run's network learns, made by rank 0 alone, so that no other worker waits for them.

During training, the first layer's filters, which are a few numbers, are copied at the end of an epoch, and the
tracker's thread draws them. At the end, a bounded number of validation pictures is run through the best model.
The copies are part of a checkpoint, so that the animation of a resumed run is complete.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cvdist import log
from cvdist.config import TrainConfig
from cvdist.data.dataset import Loader
from cvdist.data.normalize import Normalizer
from cvdist.figures import network
from cvdist.interpret.interpretation import Limits, interpret_model
from cvdist.interpret.layers import ConvLayer, convolutions, select_layers
from cvdist.tracking.tracker import Tracker

if TYPE_CHECKING:
    from cvdist.training.run import Run

logger = logging.getLogger(__name__)

_MOST_FRAMES = 40
_USUAL_PICTURES = 5  # of the first layer over a run
# `Loader.pictures` returns this value in all pixels of a picture whose original can't be read any more.
_UNREADABLE = 128


class Visualizer:
    """Makes the pictures of one run's network, or does nothing at all if `enabled` is false."""

    def __init__(self, config: TrainConfig, model: nn.Module, tracker: Tracker, *, enabled: bool) -> None:
        """Choose the layers to show.

        Args:
            config: All settings.
            model: The whole model.
            tracker: Where pictures are logged.
            enabled: Whether this worker makes pictures at all.

        Raises:
            UserError: If `--visualize-layers` names a layer that the model does not have. It is raised even if
                not enabled, so that all workers raise it alike.
        """
        settings, epochs = config.visualize, config.loop.epochs
        found = convolutions(model)
        wanted = settings.enabled and config.tracking.mode != "none" and bool(found)
        chosen = select_layers(model, settings.layers, "--visualize-layers") if wanted else []
        self.enabled = enabled and wanted
        self._names = [layer.name for layer in chosen]
        self._trained = {layer.name for layer in found if layer.module.weight.requires_grad}
        self._first = found[0].name if found else ""
        self.tracker, self._epochs, self._pictures = tracker, epochs, settings.pictures
        self._frame_every = math.ceil(epochs / _MOST_FRAMES)
        self._picture_every = settings.every or math.ceil(epochs / _USUAL_PICTURES)
        self._before: dict[str, Tensor] = {}
        # By epoch, as a string, because the keys of a checkpoint are strings.
        self._frames: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """Return the copied filters, for a checkpoint."""
        return {"before": self._before, "frames": self._frames}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over the copied filters of a checkpoint. `state` is None if it has none."""
        if self.enabled and state:
            self._before = {name: weight.cpu() for name, weight in state["before"].items()}
            self._frames = {epoch: weight.cpu() for epoch, weight in state["frames"].items()}

    def start(self, model: nn.Module, *, fresh: bool) -> None:
        """Copy the filters that training is about to change.

        Args:
            model: The model that is validated.
            fresh: Whether training has not begun yet. Otherwise, the filters that were copied then are drawn
                again.
        """
        if not self.enabled:
            return
        if fresh:
            names = self._trained & set(self._names)
            self._before = {layer.name: layer.weight for layer in convolutions(model) if layer.name in names}
            self.epoch_done(model, 0)
            return
        for epoch in self._frames:
            self._draw_frame(int(epoch))  # a killed attempt may not have delivered it

    def epoch_done(self, model: nn.Module, epoch: int) -> None:
        """Copy the first layer's filters, after the epochs of which a picture is wanted."""
        if not self.enabled or self._first not in self._trained:
            return
        if epoch % self._frame_every == 0 or epoch % self._picture_every == 0 or epoch == self._epochs:
            self._frames[str(epoch)] = convolutions(model)[0].weight
            self._draw_frame(epoch)

    def finish(self, run: Run, model: nn.Module) -> None:
        """Log the pictures of a finished run's best model. An error is logged and does not end the run."""
        if not self.enabled:
            return
        try:
            layers = [layer for layer in convolutions(model) if layer.name in self._names]
            self._show_filters(layers, run.progress.best_epoch)
            if self._pictures:
                self._show_pictures(run, model, layers)
        except Exception as error:  # pictures must not cost the result
            logger.warning("figures    not all could be made: %s: %s", type(error).__name__, error)
            logger.debug("", exc_info=True)

    def _draw_frame(self, epoch: int) -> None:
        if epoch % self._picture_every == 0 or epoch == self._epochs:
            weight, name = self._frames[str(epoch)], self._first
            when = f"after epoch {epoch}" if epoch else "before training"
            draw = functools.partial(network.filter_figure, name, weight, "strongest", when)
            self.tracker.log_figure(f"filters/{name}-epoch-{epoch:04}", draw)

    def _show_filters(self, layers: Sequence[ConvLayer], best_epoch: int) -> None:
        for layer in layers:
            name, weight, place = layer.name, layer.weight, f"filters/{layer.name}"
            when = f"after epoch {best_epoch}"
            if name not in self._trained:
                when = "frozen, so unchanged"
            self.tracker.log_figure(
                place, functools.partial(network.filter_figure, name, weight, "strongest", when)
            )
            if network.small_enough_for_svg(layer):
                make = functools.partial(network.filters_svg, name, weight, when)
                self.tracker.log_artifact(f"figures/{place}.svg", make)
            if name in self._before:
                draw = functools.partial(network.before_and_after, name, self._before[name], weight, when)
                self.tracker.log_figure(f"{place}-before-after", draw)
        if len(self._frames) > 1:
            frames = sorted((int(epoch), weight) for epoch, weight in self._frames.items())
            self.tracker.log_artifact(
                "figures/filters/forming.gif", functools.partial(network.animate_filters, self._first, frames)
            )

    def _show_pictures(self, run: Run, model: nn.Module, layers: Sequence[ConvLayer]) -> None:
        started = time.monotonic()
        source = ValidationPictures(run.loader)
        looked_at, _ = source.read(range(min(4, source.size)))
        if bool((looked_at == _UNREADABLE).all()):
            logger.warning("figures    without activations and Grad-CAM: the original pictures can't be read")
            return
        info, best, device = run.info, run.best, run.worker.device
        assert best is not None
        result = interpret_model(
            model.to(device),  # if trained from cached features, its frozen layers are still on the CPU
            source,
            info.classes,
            Normalizer(info.mean, info.std, device, channels_last=run.config.loop.channels_last),
            device,
            layers,
            Limits(pictures=self._pictures),
            include=[mistake.index for mistake in best.mistakes],
            counts=None if info.multilabel else (best.correct, best.total - best.correct),
            multilabel=info.multilabel,
            autocast=run.precision.autocast,
        )
        for name, draw in network.interpretation_figures(result, source).items():
            self.tracker.log_figure(name, draw)
        logger.info(
            "figures    %d of %d validation pictures looked at in %s",
            result.seen,
            result.available,
            log.duration(time.monotonic() - started),
        )


class ValidationPictures:
    """The original validation pictures of a data set, as a `cvdist.interpret.interpretation.PictureSource`."""

    def __init__(self, loader: Loader) -> None:
        """Read the pictures from `loader`."""
        self._loader = loader
        self.size = self.available = loader.info.valid_size

    def read(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Return the pictures of some rows, uint8 (n, C, H, W), and the names of their classes."""
        return self._loader.pictures("valid", rows)
