"""What tests look at in figures."""

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


def lay_out(figure):
    """Let everything find its place, once for a figure, which takes less than drawing."""
    if figure.stale:
        figure.draw_without_rendering()


def written(figure):
    """The texts of the figure that are seen."""
    lay_out(figure)
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def tiles_of(figure):
    """The pictures of a figure, each with the box in pixels, from the lower left, in which it is drawn."""
    lay_out(figure)
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
    _texts_apart(figure)


def assert_tidy(figure):
    """It is readable, and no picture leaves the figure or lies over another one or over a text."""
    drawn = _edges([box for box, _ in tiles_of(figure)])
    said, edges = _texts_apart(figure)
    assert (drawn[:, :2] >= 0).all() and (drawn[:, 2:] <= (figure.bbox.x1, figure.bbox.y1)).all()
    assert not [(a, b) for a, b in _overlaps(drawn, drawn) if a < b]
    assert not [said[text] for text, _ in _overlaps(edges, drawn)]


def _texts_apart(figure):
    """The texts and their edges (n, 4), which lie in the figure and apart from each other."""
    texts = _in_view(figure)
    said, edges = [text.get_text() for text in texts], _edges([text.get_window_extent() for text in texts])
    for text, (left, low, right, high) in zip(said, edges, strict=True):
        assert left >= 0 and low >= 0 and right <= figure.bbox.x1 and high <= figure.bbox.y1, text
    assert not [(said[a], said[b]) for a, b in _overlaps(edges, edges) if a < b]
    return said, edges


def _edges(boxes):
    return np.array([box.extents for box in boxes]).reshape(-1, 4)


def _overlaps(some, others):
    """Pairs of the numbers of boxes (n, 4) and (m, 4) that lie over each other."""
    # Fonts' boxes hold air above and below the letters: a touch of up to 2 pixels is no overlap.
    shared = np.minimum(some[:, None, 2:], others[:, 2:]) - np.maximum(some[:, None, :2], others[:, :2])
    return np.argwhere((shared > 2).all(-1)).tolist()


def _in_view(figure):
    """Without the ticks that matplotlib prepares outside the limits, and without turned texts."""
    texts, hidden = written(figure), set()  # drawing places the ticks
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        hidden |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
    return [text for text in texts if text not in hidden and text.get_rotation() % 90 == 0]
