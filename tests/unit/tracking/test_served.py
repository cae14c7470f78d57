"""A logged model decodes pictures by itself, with Pillow: to the pixels that jobs see."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvdist.data.images.decode import decode, to_gray
from tests.helpers import pictures
from tests.helpers.odd_pictures import app1, oriented, with_segments
from tests.helpers.quarters import encoded, quarters

LEVELS = np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10
FILES = {
    **{f"held as {number}": with_segments(app1(oriented(number))) for number in range(1, 9)},
    "damaged EXIF": with_segments(app1(b"no exif")),
    "16 bits": encoded(Image.fromarray(LEVELS), "PNG"),
    "CMYK": encoded(quarters(mode="CMYK")),
    "palette": encoded(quarters().quantize(4), "PNG", transparency=0),
    "transparent": encoded(Image.new("RGBA", (70, 50), (200, 30, 90, 99)), "PNG"),
    "gray": encoded(quarters(mode="L")),
    "gray with alpha": encoded(quarters(mode="LA"), "PNG"),
    "black and white": encoded(quarters(mode="1"), "PNG"),
    "subsampled": pictures.jpeg(1),
    "large": pictures.jpeg(2, 603, 401),
    "tall": pictures.jpeg(3, 50, 290),
    "tiny": pictures.jpeg(4, 3, 5),
    "progressive": encoded(quarters(), progressive=True),
    "WebP": encoded(quarters(), "WEBP"),
    "GIF": encoded(quarters(), "GIF"),
}


@pytest.fixture(scope="module")
def served():
    from cvdist.tracking import served  # MLflow comes with it, for which other tests need not wait

    return served


@pytest.mark.parametrize(
    "resize", ["squash", "crop", "crop:36:bilinear", "crop:40:bicubic", "crop:24:bilinear"]
)
@pytest.mark.parametrize("name", FILES)
def test_the_pixels_are_those_of_jobs(served, name, resize):
    ours = decode(FILES[name], 32, resize).permute(2, 0, 1)
    theirs = served.decode(FILES[name], 32, resize)
    assert theirs.dtype == torch.uint8 and theirs.shape == (3, 32, 32)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (to_gray(ours[None])[0] - served.to_gray(theirs)).abs().max() <= 1


def test_what_is_served_needs_no_package_but_those_it_names(served):
    tree = ast.parse(Path(served.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert outside == {"mlflow", "numpy", "torch", "PIL"}
