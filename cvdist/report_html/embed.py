"""Embed figures in a page as data URIs, and shrink them if the page would become too large."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from cvdist.report_html.content import FigureFile

TYPES = {
    ".png": "image/png",
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
# Steps of shrinking. In each step, animations also lose every second frame.
_STEPS = ((1800, 90), (1200, 80), (800, 65))  # longest side in pixels, quality of WebP


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure as it goes into the page.

    Attributes:
        path: Path below the run's `figures/` folder.
        uri: Data URI with the content.
        width: Width in pixels before shrinking; 0 if unknown.
        height: Height in pixels before shrinking; 0 if unknown.
    """

    path: str
    uri: str
    width: int
    height: int


def embed(pictures: Sequence[FigureFile], budget: int) -> tuple[list[EmbeddedFigure], list[str]]:
    """Encode figures as data URIs of at most `budget` characters in total.

    While they are too large, the largest one is shrunk by a step. When none can be shrunk any further, the
    least important one is left out.

    Args:
        pictures: The figures, the most important first.
        budget: Most characters of all data URIs together.

    Returns:
        The embedded figures, and one line for each figure that was shrunk or left out.
    """
    kept = [_ShrinkableFigure(picture) for picture in pictures]
    lines = [f"{one.where} can't be read as a picture" for one in kept if not one.readable]
    kept = [one for one in kept if one.readable]
    while kept and sum(one.characters for one in kept) > budget:
        shrinkable = [one for one in kept if one.step < len(_STEPS) and one.type != "image/svg+xml"]
        if shrinkable:
            max(shrinkable, key=lambda one: one.characters).shrink()
        else:
            lines.append(f"{kept.pop().where} is left out: the report is limited in size")
    lines += [f"{one.where} is smaller here than among the artifacts" for one in kept if one.smaller]
    return [EmbeddedFigure(one.path, one.uri, *one.size) for one in kept], lines


class _ShrinkableFigure:
    """A figure, and by how many steps it was shrunk."""

    def __init__(self, picture: FigureFile) -> None:
        self.path, self._data = picture.path, picture.data
        self.type = TYPES.get(PurePosixPath(picture.path).suffix.lower(), "")
        self.where = f"figures/{picture.path}"
        self.step = 0
        self.smaller = False
        self.size = (0, 0)
        self.readable = bool(self.type) and (self.type == "image/svg+xml" or self._measure())
        self._original = picture.data

    @property
    def uri(self) -> str:
        return f"data:{self.type};base64,{base64.b64encode(self._data).decode('ascii')}"

    @property
    def characters(self) -> int:
        return len("data:;base64,") + len(self.type) + 4 * -(-len(self._data) // 3)

    def shrink(self) -> None:
        """Shrink the figure by one step. The result is kept only if it is smaller than before."""
        side, quality = _STEPS[self.step]
        self.step += 1
        try:
            with Image.open(io.BytesIO(self._original)) as image:
                animated = getattr(image, "n_frames", 1) > 1
                save: Callable[..., bytes] = _animation if animated else _still
                data = save(image, side, quality, self.step)
        except (OSError, ValueError, Image.DecompressionBombError):
            self.step = len(_STEPS)
            return
        if len(data) < len(self._data):
            self._data, self.type, self.smaller = data, "image/webp", True

    def _measure(self) -> bool:
        try:
            with Image.open(io.BytesIO(self._data)) as image:
                self.size = image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            return False
        return True


def _still(image: Image.Image, side: int, quality: int, step: int) -> bytes:
    output = io.BytesIO()
    _fitted(image, side).save(output, "WEBP", quality=quality, method=4)
    return output.getvalue()


def _animation(image: Image.Image, side: int, quality: int, step: int) -> bytes:
    """Keep every 2nd, 4th or 8th frame and the last one, each for the duration of the frames it replaces."""
    count = int(getattr(image, "n_frames", 1))
    every = 2**step
    frames, durations = [], []
    for number in range(count):
        image.seek(number)
        duration = int(image.info.get("duration", 100))
        if number % every == 0 or number == count - 1:
            frames.append(_fitted(image, side))
            durations.append(duration)
        else:
            durations[-1] += duration
    output = io.BytesIO()
    frames[0].save(
        output, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality
    )
    return output.getvalue()


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """Convert an image to RGB or RGBA, and scale it down to at most `side` pixels in width and height."""
    picture = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture
