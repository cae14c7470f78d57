"""The formats of pictures, and which of them can be read here.

Files are listed by the suffixes of their names, and decoded by their first bytes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

RAW = "camera raw"


@dataclass(frozen=True)
class Extra:
    """An optional package without which a format can't be read.

    Attributes:
        name: name of the extra in pyproject.toml.
        module: module that it installs.
        package: package that has the module.
    """

    name: str
    module: str
    package: str

    @property
    def hint(self) -> str:
        """What to do to read such files."""
        return f"read with the extra {self.name} (pip install {self.package})"

    @property
    def installed(self) -> bool:
        """Whether the package is installed."""
        return _is_installed(self.module)


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


EXTRAS = {
    "HEIC": Extra("heif", "pillow_heif", "pillow-heif"),
    "JPEG XL": Extra("jxl", "pillow_jxl", "pillow-jxl-plugin"),
}
_ALWAYS = "always read"
_SUFFIXES = {
    format: re.compile(pattern, re.IGNORECASE)
    for format, pattern in {
        _ALWAYS: r"\.(jpe?g|jpe|jfif|png|gif|bmp|webp|tiff?|p[bgp]m|avif|jp2|tga|ico)",
        "HEIC": r"\.(hei[cf]|hif)",
        "JPEG XL": r"\.jxl",
        RAW: r"\.(3fr|arw|cr[23w]|dcr|dng|erf|iiq|kdc|mef|mos|mrw|nef|nrw|orf|pef|ra[fw]|rw[2l]|sr[2fw]|x3f)",
    }.items()
}
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


def format_by_name(path: str) -> str:
    """Return the format that a file's suffix names, whether or not it is read here; empty if none."""
    suffix = PurePosixPath(path).suffix
    return next((format for format, pattern in _SUFFIXES.items() if pattern.fullmatch(suffix)), "")


def is_read(path: str) -> bool:
    """Return whether a file is, by its name, a picture of a format that is read here."""
    format = format_by_name(path)
    return EXTRAS[format].installed if format in EXTRAS else format == _ALWAYS


def unread_formats(counts: Mapping[str, int]) -> str:
    """Return one line on what to do about files of unread formats; `counts`: files by `format_by_name`."""
    return "; ".join(
        f"{counts[format]:,} {'files are' if counts[format] > 1 else 'file is'} {format}, "
        + (EXTRAS[format].hint if format in EXTRAS else "which is not supported: convert to JPEG or TIFF")
        for format in (*EXTRAS, RAW)
        if counts.get(format)
    )


def identify(content: bytes) -> str:
    """Return the format that a file's first bytes tell, whatever its name; empty if they tell none."""
    return next((format for pattern, format in _MAGIC if pattern.match(content[:64])), "")


def not_read(content: bytes, format: str) -> str:
    """Return why a file of this format, or of none (`identify`), isn't read here; empty if it may be read."""
    if format == RAW or (format in EXTRAS and not EXTRAS[format].installed):
        return not_supported(format)
    if format or not content:
        return "" if content else "0 bytes"
    start = content[:2048].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n") if content.strip(b"\0") else b"\0"
    return next((what for pattern, what in _NO_PICTURES if pattern.match(start)), "")


def not_supported(format: str) -> str:
    """Return the message that a format isn't read here."""
    extra = EXTRAS.get(format)
    return f"a format that is not supported: {format}" + (f" without the extra {extra.name}" if extra else "")


def became_readable(reason: str) -> bool:
    """Return whether `reason` says that an extra was missing, which is installed now."""
    return any(reason == not_supported(format) and extra.installed for format, extra in EXTRAS.items())
