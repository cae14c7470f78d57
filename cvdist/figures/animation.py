"""Filters forming over a run, as a GIF."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from cvdist.figures import style, tiles
from cvdist.figures.filters import filter_grid, scale_of

_DPI = 100  # 900 pixels wide
_COLORS = 128
_RAMP = 200  # rows of pixels
_LAST_SECONDS = 2.5
_WHOLE_SECONDS = 8.0  # of a pass, about
_SLOWEST, _FASTEST = 0.5, 0.12  # seconds a frame


def forming(frames: Sequence[tuple[int, Tensor]], name: str) -> bytes:
    """A GIF of a layer's filters, a frame a moment, all on the scale of the last.

    The same frames give the same bytes. A bar at the lower edge tells how far the run has come.

    Args:
        frames: (epoch, weights (outputs, inputs, h, w)), in order; epoch 0 is before training.
        name: of the layer.

    Raises:
        ValueError: without frames.
    """
    if not frames:
        raise ValueError("an animation without frames")
    scale = scale_of(frames[-1][1])
    last = max(frames[-1][0], 1)
    pictures = [_render(epoch, weight, name, scale, epoch / last) for epoch, weight in frames]
    # One palette for all frames: with one for each, colours would flicker.
    sample = Image.fromarray(
        np.concatenate([np.asarray(pictures[i]) for i in sorted({0, len(pictures) // 2, -1})])
    )
    palette = sample.quantize(_COLORS, method=Image.Quantize.MEDIANCUT)
    few = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    seconds = min(max(_WHOLE_SECONDS / len(few), _FASTEST), _SLOWEST)
    durations = [round(1000 * seconds)] * (len(few) - 1) + [round(1000 * _LAST_SECONDS)]
    file = io.BytesIO()
    few[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=few[1:],
        duration=durations,
        loop=0,
        optimize=False,
        disposal=1,
    )
    return file.getvalue()


def _render(epoch: int, weight: Tensor, name: str, scale: float, share: float) -> Image.Image:
    """One frame, RGB."""
    when = f"after epoch {epoch}" if epoch else "before training"
    figure = filter_grid(weight, name, when=when, scale=scale, channels="mean")
    axes = figure.axes[0]
    axes.add_patch(Rectangle((0, 0), tiles.WIDTH, 0.06, color=style.GRID, linewidth=0))
    axes.add_patch(Rectangle((0, 0), tiles.WIDTH * share, 0.06, color=style.BLUE, linewidth=0))
    figure.set_dpi(_DPI)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())  # type: ignore[attr-defined]
