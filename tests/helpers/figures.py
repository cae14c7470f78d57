"""What tests look at in figures."""

from itertools import combinations

import numpy as np
import torch
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cvdist.figures import style

LONG_NAMES = ["German short-haired pointer", "great white shark, white shark, man-eater", "US$ 1 and US$ 5"]


def images(count, channels=1, height=28, width=28):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def png(figure, tmp_path, name="figure.png"):
    style.save_png(figure, tmp_path / name)
    return (tmp_path / name).read_bytes()


def written(figure):
    """The texts of the figure that are seen."""
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def tiles_of(figure):
    """The pictures of a figure, each with the box in pixels, from the lower left, in which it is drawn."""
    figure.canvas.draw()
    found = []
    for image in figure.findobj(AxesImage):
        box = image.get_window_extent()
        found.append((Bbox.from_extents(box.xmin, box.ymin, box.xmax, box.ymax), np.asarray(image.get_array())))
    return found


def says(figure):
    return [text.get_text() for text in written(figure)]


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255


def assert_readable(figure):
    """No text leaves the figure, and none lies over another."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in _in_view(figure)]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not _overlap(a, b), (one, other)


def assert_tidy(figure):
    """It is readable, and no picture leaves the figure or lies over another one or over a text."""
    assert_readable(figure)
    drawn = [box for box, _ in tiles_of(figure)]
    for box in drawn:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not any(_overlap(a, b) for a, b in combinations(drawn, 2))
    for text in _in_view(figure):
        assert not any(_overlap(text.get_window_extent(), box) for box in drawn), text.get_text()


def _overlap(a, b):
    # Fonts' boxes hold air above and below the letters: a touch of up to 2 pixels is no overlap.
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2


def _in_view(figure):
    """Without the ticks that matplotlib prepares outside the limits, and without turned texts."""
    texts, hidden = written(figure), set()  # drawing places the ticks
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        hidden |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
    return [text for text in texts if text not in hidden and text.get_rotation() % 90 == 0]
