"""The page of an inspection: what may be wrong with pictures, each shown beside its twin."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

import cvdist
from cvdist.report_html.page import environment, printable

SIDE = 176
"""Longest side of a thumbnail in pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Attributes:
        path: Path of the whole picture.
        label: Class of the picture.
        split: The part of the data that it is in.
        uri: Data URI of a JPEG.
        width: Width in pixels.
        height: Height in pixels.
    """

    path: str
    label: str
    split: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Finding:
    """A picture, what is wrong with it, and the picture that it is a copy of, if there is one."""

    picture: Thumbnail
    text: str
    twin: Thumbnail | None = None


@dataclass(frozen=True)
class Section:
    """Findings of one kind, of which `findings` are the first ones. total: how many there are."""

    title: str
    introduction: str
    findings: tuple[Finding, ...]
    total: int


@dataclass(frozen=True)
class InspectionPage:
    """All that the page of an inspection shows.

    Attributes:
        name: Title.
        subject: Data and features in a few words.
        tiles: Numbers, each with what it counts as its key.
        lines: Sentences below the tiles.
        command: The command that made the page.
        sections: The findings.
    """

    name: str
    subject: str
    tiles: Mapping[str, str]
    lines: tuple[str, ...]
    command: str
    sections: tuple[Section, ...]


def thumbnail(pixels: Tensor, width: float, height: float, path: str, label: str, split: str) -> Thumbnail:
    """Make a thumbnail in the picture's own proportions.

    Args:
        pixels: The picture as a square, uint8 (side, side, 3).
        width: Width of the whole picture in pixels.
        height: Height of the whole picture in pixels.
        path: Path of the whole picture.
        label: Class of the picture.
        split: The part of the data that it is in.
    """
    scale = SIDE / max(width, height, 1)
    shown = (max(1, round(width * scale)), max(1, round(height * scale)))
    content = io.BytesIO()
    Image.fromarray(pixels.numpy()).resize(shown, Image.Resampling.BILINEAR).save(content, "JPEG", quality=80)
    uri = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    return Thumbnail(path, label, split, uri, *shown)


def render(page: InspectionPage) -> str:
    """Render the page."""
    return printable(
        environment().get_template("inspection.html.j2").render(page=page, version=cvdist.__version__)
    )
