"""An animated GIF of how the filters of a layer change during training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from cvdist.figures import style
from cvdist.figures.filters import filter_grid, scale_of

_DPI = 100  # 900 pixels wide
_COLORS = 128
_LAST_SECONDS = 2.5
_WHOLE_SECONDS = 8.0  # approximate duration of one pass through all frames
_SLOWEST, _FASTEST = 0.5, 0.12  # seconds per frame


def animate_filters(frames: Sequence[tuple[int, Tensor]], name: str) -> bytes:
    """Draw a layer's filters after each of several epochs, and return them as an animated GIF.

    All frames share the color scale of the last one. A bar at the lower edge shows the progress of the run. The
    same frames give the same bytes.

    Args:
        frames: Pairs of an epoch and the layer's weights after it, float (outputs, inputs, h, w), in the order
            of the epochs. Epoch 0 stands for the weights before training.
        name: Name of the layer.

    Returns:
        The content of a GIF file.

    Raises:
        ValueError: If `frames` is empty.
    """
    if not frames:
        raise ValueError("an animation without frames")
    scale = scale_of(frames[-1][1])
    last = max(frames[-1][0], 1)
    pictures = [_render(epoch, weight, name, scale, epoch / last) for epoch, weight in frames]
    # All frames share one palette: with a palette per frame, colors would flicker.
    sample = np.concatenate([np.asarray(pictures[i]) for i in sorted({0, len(pictures) // 2, -1})])
    palette = Image.fromarray(sample).quantize(_COLORS, method=Image.Quantize.MEDIANCUT)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    seconds = min(max(_WHOLE_SECONDS / len(pictures), _FASTEST), _SLOWEST)
    durations = [round(1000 * seconds)] * len(others) + [round(1000 * _LAST_SECONDS)]
    file = io.BytesIO()
    options: dict[str, Any] = {"duration": durations, "loop": 0, "optimize": False, "disposal": 1}
    first.save(file, "GIF", save_all=True, append_images=others, **options)
    return file.getvalue()


def _render(epoch: int, weight: Tensor, name: str, scale: float, progress: float) -> Image.Image:
    """Draw one frame as an RGB image, with a bar whose length is `progress`, in [0, 1]."""
    when = f"after epoch {epoch}" if epoch else "before training"
    figure = filter_grid(weight, name, when=when, scale=scale, channels="mean")
    for end, color in ((1.0, style.GRID), (progress, style.BLUE)):
        bar = Rectangle((0, 0), end, 0.06 / figure.get_figheight(), color=color, linewidth=0)
        figure.add_artist(bar)
    figure.set_dpi(_DPI)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())  # type: ignore[attr-defined]
