"""Which formats of pictures are read: by a file's name when it is listed, and by its first bytes when it is decoded."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

# In a listing; what a file really is, its first bytes say.
_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .avif .jp2 .tga .ico".split()
)
_RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 "
    ".srf .srw .x3f".split()
)
RAW = "camera raw"


@dataclass(frozen=True)
class Extra:
    """A package without which a format is not read.

    Attributes:
        name: of the extra in pyproject.toml.
        module: that it brings.
        package: that has the module.
        suffixes: of the format's files.
    """

    name: str
    module: str
    package: str
    suffixes: tuple[str, ...]

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return _is_installed(self.module)


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


EXTRAS = {
    "HEIC": Extra("heif", "pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    "JPEG XL": Extra("jxl", "pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
}
_BY_SUFFIX = {suffix: format for format, extra in EXTRAS.items() for suffix in extra.suffixes}
_BY_SUFFIX |= dict.fromkeys(_RAW_SUFFIXES, RAW)

_MAGIC = [
    (re.compile(pattern, re.DOTALL), format)
    for pattern, format in [
        (rb"\xff\xd8", "JPEG"),
        (rb"\x89PNG", "PNG"),
        (rb"GIF8[79]a", "GIF"),
        (rb"BM", "BMP"),
        (rb"RIFF....WEBP", "WEBP"),
        (rb"(II\*\0|MM\0\*).{4}CR|II(RO|RS|U\0)|FUJIFILM|\0MRM|FOVb|....ftypcrx ", RAW),
        (rb"II[*+]\0|MM\0[*+]", "TIFF"),
        (rb"P[1-7][\s#]|P[fF]\s", "PPM"),
        (rb"....ftypavi[fs]|....ftyp(mif1|msf1|miaf).{,40}avi[fs]", "AVIF"),
        (rb"....ftyp(he[iv][cmsx]|mif1|msf1|miaf)", "HEIC"),
        (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JPEG XL"),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG2000"),
        (rb"\0\0\x01\0[^\0]", "ICO"),
    ]
]
_NO_PICTURES = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what)
    for pattern, what in [
        (rb"version https://git-lfs", "not a picture: a Git LFS pointer"),
        (rb"(<\?xml.{,1000})?<svg|<\?xml.{,1000}<svg", "a format that is not supported: SVG"),
        (rb"<!doctype html|.{,1000}<html|.{,1000}<(head|body)\b", "not a picture: HTML"),
        (rb"<\?xml|<[a-z]", "not a picture: XML"),
        (rb"[{\[]\s*[\"{\[\]}0-9]", "not a picture: JSON"),
        (rb"%PDF", "a format that is not supported: PDF"),
        (rb"8BPS", "a format that is not supported: PSD"),
        (rb"PK\x03\x04", "not a picture: a ZIP archive"),
        (rb"\x1f\x8b", "not a picture: a gzip archive"),
        (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3", "not a picture: a video"),
        (rb"\0+\Z", "not a picture: nothing but zeros"),
        (rb"[\t\n\r\x20-\x7e\x80-\xff]{,1000}\Z", "not a picture: text"),
    ]
]


def is_read(path: str) -> bool:
    """Return whether files of this name are pictures, of a format that is read here."""
    suffix = PurePosixPath(path).suffix.lower()
    format = _BY_SUFFIX.get(suffix)
    return EXTRAS[format].installed if format in EXTRAS else suffix in _SUFFIXES


def unread_formats(paths: Iterable[str]) -> str:
    """Say, in one line, which of these files have formats that are not read here, and what to do; or nothing."""
    counts = Counter(_BY_SUFFIX.get(PurePosixPath(path).suffix.lower(), "") for path in paths)
    said = []
    for format, count in sorted(counts.items()):
        if extra := EXTRAS.get(format):
            needed = f"read with the extra {extra.name} (pip install {extra.package})"
            said.append(f"{count:,} {'files are' if count > 1 else 'file is'} {format}, {needed}")
        elif format == RAW:
            said.append(
                f"{count:,} {'files are' if count > 1 else 'file is'} camera raw, which is not supported: convert "
                "to JPEG or TIFF"
            )
    return "; ".join(said)


def identify(content: bytes) -> str:
    """Return the format of a file as its first bytes say, whatever its name; empty if they don't."""
    return next((format for pattern, format in _MAGIC if pattern.match(content[:64])), "")


def not_read(content: bytes, format: str) -> str:
    """Say why a file whose format is `format` (`identify`) is none that is read here; empty if it may be one."""
    if format == RAW or (format in EXTRAS and not EXTRAS[format].installed):
        return not_supported(format)
    if format or not content:
        return "" if content else "0 bytes"
    start = content[:2048].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n") if content.strip(b"\0") else b"\0"
    return next((what for pattern, what in _NO_PICTURES if pattern.match(start)), "")


def not_supported(format: str) -> str:
    """Say that a format isn't read here."""
    extra = EXTRAS.get(format)
    return f"a format that is not supported: {format}" + (f" without the extra {extra.name}" if extra else "")


def became_readable(reason: str) -> bool:
    """Return whether a file wasn't read for `reason` because an extra was missing that is here now."""
    return any(reason == not_supported(format) and extra.installed for format, extra in EXTRAS.items())
