"""Reports as tests read them, and what they are made of."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from cvdist.results import EpochRecord

HOSTILE = "<script>alert(1)</script>\" onerror='x' & ]]> <!-- \x00 \udcff"
"""A name that a page must show as text."""


class Parsed(HTMLParser):
    """Elements with their attributes, and the text without that of styles and scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._inside = [], "", ""
        self.cells, self._open = [], []
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "tr":
            self.cells.append([])

    def handle_data(self, data):
        if self._inside in ("style", "script"):
            return
        self.text += data + " "
        if self._inside in ("td", "th") and self.cells:
            self.cells[-1].append(data)

    def handle_endtag(self, tag):
        self._inside = ""

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def record(epoch, correct, **changes):
    values = {
        "epoch": epoch,
        "train_loss": 0.5,
        "train_correct": 30,
        "train_total": 40,
        "valid_loss": 0.25,
        "valid_correct": correct,
        "valid_total": 1000,
        "learning_rate": 0.01,
        "seconds": 2.0,
        "samples_per_second": 1234.0,
        "peak_memory": 2**20,
        "valid_balanced_accuracy": 0.975,
        "valid_macro_f1": 0.9876,
    }
    return EpochRecord(**{**values, **changes})


def png(width=8, height=8, *, noise=False, mode="RGB"):
    pixels = np.zeros((height, width, len(mode)), np.uint8)
    if noise:
        pixels = np.random.default_rng(width * height).integers(0, 256, pixels.shape, np.uint8)
    output = io.BytesIO()
    Image.fromarray(pixels, mode).save(output, "PNG")
    return output.getvalue()
