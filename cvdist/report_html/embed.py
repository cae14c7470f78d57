"""Pictures inside a page: data URIs, made smaller where they would be too much."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from cvdist.report_html.content import Picture

TYPES = {
    ".png": "image/png",
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
# Animations lose every second frame, and half their sides, as a step.
_STEPS = ((1800, 90), (1200, 80), (800, 65))  # widest side in pixels, quality of WebP


@dataclass(frozen=True)
class Embedded:
    """A picture as it goes into the page. width, height: of the picture as it was made, pixels; 0: unknown."""

    path: str
    uri: str
    width: int
    height: int


def embed(pictures: Sequence[Picture], budget: int) -> tuple[list[Embedded], list[str]]:
    """All of them, in at most `budget` characters; and a line for each that was made smaller or left out.

    pictures: the most important first. While they are too much, the largest one is made smaller by a step; when
    none can be any more, the least important one goes.
    """
    kept = [_Kept(picture) for picture in pictures]
    lines = [f"{one.where} can't be read as a picture" for one in kept if not one.readable]
    kept = [one for one in kept if one.readable]
    while kept and sum(one.characters for one in kept) > budget:
        can = [one for one in kept if one.step < len(_STEPS) and one.type != "image/svg+xml"]
        if can:
            max(can, key=lambda one: one.characters).shrink()
        else:
            lines.append(f"{kept.pop().where} is left out: the report is limited in size")
    lines += [f"{one.where} is smaller here than among the artifacts" for one in kept if one.smaller]
    return [Embedded(one.path, one.uri, *one.size) for one in kept], lines


class _Kept:
    """A picture, and how far it was made smaller."""

    def __init__(self, picture: Picture) -> None:
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
        """One step smaller, if the step does make it smaller."""
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
    """Every second, fourth, eighth frame, and always the last one; shown for as long as those it stands for."""
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
    picture = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture
