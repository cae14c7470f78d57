"""Embed figures in a page as data URIs, and shrink them if the page would become too large."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
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
_UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)


class EmbeddedFigure:
    """A figure as it goes into the page.

    Attributes:
        path: Path below the run's `figures/` folder.
        width: Width in pixels before shrinking; 0 if unknown.
        height: Height in pixels before shrinking; 0 if unknown.
        readable: Whether the file is a picture.
        smaller: Whether the figure was shrunk.
        step: Number of steps of shrinking that were tried.
    """

    def __init__(self, picture: FigureFile) -> None:
        self.path = picture.path
        self.type = TYPES.get(PurePosixPath(picture.path).suffix.lower(), "")
        self.where = f"figures/{picture.path}"
        self.step = 0 if self.type != "image/svg+xml" else len(_STEPS)
        self.width, self.height = 0, 0
        self._original = self._data = picture.data
        self.readable = bool(self.type)
        if self.readable and self.type != "image/svg+xml":
            try:
                with Image.open(io.BytesIO(picture.data)) as image:
                    self.width, self.height = image.size
            except _UNREADABLE:
                self.readable = False

    @property
    def smaller(self) -> bool:
        return self._data is not self._original

    @property
    def uri(self) -> str:
        """Data URI with the content."""
        return f"data:{self.type};base64,{base64.b64encode(self._data).decode('ascii')}"

    @property
    def characters(self) -> int:
        """Length of the data URI."""
        return len("data:;base64,") + len(self.type) + 4 * -(-len(self._data) // 3)

    def shrink(self) -> None:
        """Shrink the figure by one step. The result is kept only if it is smaller than before."""
        side, quality = _STEPS[self.step]
        self.step += 1
        try:
            data = _webp(self._original, side, quality, 2**self.step)
        except _UNREADABLE:
            self.step = len(_STEPS)
            return
        if len(data) < len(self._data):
            self._data, self.type = data, "image/webp"


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
    kept = [EmbeddedFigure(picture) for picture in pictures]
    lines = [f"{one.where} can't be read as a picture" for one in kept if not one.readable]
    kept = [one for one in kept if one.readable]
    while kept and sum(one.characters for one in kept) > budget:
        shrinkable = [one for one in kept if one.step < len(_STEPS)]
        if shrinkable:
            max(shrinkable, key=lambda one: one.characters).shrink()
        else:
            lines.append(f"{kept.pop().where} is left out: the report is limited in size")
    lines += [f"{one.where} is smaller here than among the artifacts" for one in kept if one.smaller]
    return kept, lines


def _webp(data: bytes, side: int, quality: int, every: int) -> bytes:
    """Scale an image down to at most `side` pixels in width and height, and encode it as WebP.

    An animation keeps one of `every` frames, and the last one. Each is shown for the time of those it replaces.
    """
    frames, durations = [], []
    with Image.open(io.BytesIO(data)) as image:
        count = getattr(image, "n_frames", 1)
        for number in range(count):
            image.seek(number)
            duration = int(image.info.get("duration", 100))
            if number % every == 0 or number == count - 1:
                frame = image.convert("RGBA" if "A" in image.getbands() else "RGB")
                frame.thumbnail((side, side), Image.Resampling.LANCZOS)
                frames.append(frame)
                durations.append(duration)
            else:
                durations[-1] += duration
    output = io.BytesIO()
    frames[0].save(
        output, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality
    )
    return output.getvalue()
