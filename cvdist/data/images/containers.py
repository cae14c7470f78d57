"""Takes picture files apart, into the bytes that the pixels depend on and the EXIF orientation.

Decoders get a file without its metadata. So no metadata can keep a picture from being decoded, and no decoder
turns the picture by rules of its own.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# ------------------------------------------------------------------------------------------------------- EXIF

_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # EXIF's types, with struct's letters


def orientation(exif: bytes) -> int:
    """Return how the camera was held, 1 to 8 as in EXIF; 1, which is upright, where EXIF doesn't say it."""
    found = 1
    try:
        tiff = exif.removeprefix(b"Exif\0\0")
        order, entries = _directory(tiff)[:2]
        for tag, kind, count, value in entries:
            if tag == _ORIENTATION and kind in _INTEGERS and count:  # of several values, the first
                integer = struct.Struct(order + _INTEGERS[kind])
                apart = count * integer.size > len(value)
                place = int.from_bytes(value, "little" if order == "<" else "big") if apart else 0
                (found,) = integer.unpack_from(tiff if apart else value, place)
    except (ValueError, struct.error):  # damaged; what stands before the damage counts
        pass
    return found if 1 <= found <= 8 else 1


def _directory(tiff: bytes) -> tuple[str, Iterator[tuple[int, int, int, bytes]], int, int, int]:
    """Find the first directory of a TIFF file, which is also what EXIF is.

    Returns:
        Byte order for struct; the entries: tag, type, number of values, and the bytes of the value or of its
        offset; the directory's place; the size of its counter, and of an entry.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        raise ValueError("neither II nor MM")
    if struct.unpack_from(order + "H", tiff, 2)[0] == 43:  # BigTIFF
        place, number, entry = struct.unpack_from(order + "Q", tiff, 8)[0], "Q", "HHQ8s"
    else:
        place, number, entry = struct.unpack_from(order + "L", tiff, 4)[0], "H", "HHL4s"
    counter, size = struct.calcsize(order + number), struct.calcsize(order + entry)
    count = struct.unpack_from(order + number, tiff, place)[0]
    entries = (struct.unpack_from(order + entry, tiff, place + counter + i * size) for i in range(count))
    return order, entries, place, counter, size


# ----------------------------------------------------------------------------------------- all formats but JPEG


@dataclass(frozen=True)
class Parts:
    """The parts of a file.

    Attributes:
        content: the file without its metadata.
        exif: the EXIF metadata; empty without any.
        is_cut: whether the file ends before it should.
    """

    content: bytes
    exif: bytes = b""
    is_cut: bool = False


_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def _split_png(content: bytes) -> Parts:
    kept, exif, place, kind = [content[:8]], b"", 8, b""
    while kind != b"IEND" and place + 8 <= len(content):
        length, kind = struct.unpack_from(">L4s", content, place)
        end = place + 12 + length
        if kind in _PNG_CHUNKS:
            kept.append(content[place:end])
        elif kind == b"eXIf":
            exif = content[place + 8 : end - 4]
        elif kind == b"zTXt" and not exif and content.startswith(b"Raw profile type exif\0\0", place + 8):
            exif = _raw_profile(content[place + 31 : end - 4])
        place = end
    return Parts(b"".join(kept), exif, kind != b"IEND" or place > len(content))


def png_data(png: bytes) -> Iterator[bytes]:
    """Yield the packed pixels of a PNG that has been split, in pieces."""
    place = 8
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">L4s", png, place)
        if kind == b"IDAT":
            yield png[place + 8 : place + 8 + length]
        place += 12 + length


def _raw_profile(packed: bytes) -> bytes:
    """Unpack EXIF as ImageMagick wrote it before PNG had a chunk for it: in hexadecimal."""
    try:
        text = zlib.decompressobj().decompress(packed, 1 << 20)
        return bytes.fromhex(b"".join(text.split()[2:]).decode())
    except (zlib.error, ValueError):
        return b""


_WEBP_CHUNKS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA = 0x2C  # the flags of ICC profile, EXIF and XMP


def _split_webp(content: bytes) -> Parts:
    kept, exif, place = [], b"", 12
    while place + 9 <= len(content):
        kind, length = struct.unpack_from("<4sL", content, place)
        end = place + 8 + length + length % 2
        if kind == b"VP8X":
            kept += [content[place : place + 8], bytes([content[place + 8] & ~_WEBP_METADATA])]
            kept.append(content[place + 9 : end])
        elif kind in _WEBP_CHUNKS:
            kept.append(content[place:end])
        elif kind == b"EXIF":
            exif = content[place + 8 : end]
        place = end
    chunks = b"".join(kept)
    return Parts(b"RIFF" + struct.pack("<L", 4 + len(chunks)) + b"WEBP" + chunks, exif, place > len(content))


# The tags that say where a TIFF's pixels are and what they mean.
_TIFF_TAGS = {262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 332, 338, 339, 347}.union(
    range(254, 260), range(322, 326), range(512, 522), range(529, 533)
)


def _split_tiff(content: bytes) -> Parts:
    try:
        order, entries, place, counter, size = _directory(content)
        tags = [entry[0] for entry in entries]
    except struct.error:
        return Parts(content, is_cut=True)
    start = place + counter
    kept = [content[start + i * size :][:size] for i, tag in enumerate(tags) if tag in _TIFF_TAGS]
    number = len(kept).to_bytes(counter, "little" if order == "<" else "big")
    # The pointer to a next directory becomes 0: the first one has the picture.
    shorter = (number + b"".join(kept)).ljust(counter + len(tags) * size + (size - 4) // 2, b"\0")
    return Parts(content[:place] + shorter + content[place + len(shorter) :], content)


_EXIF_ITEM = re.compile(rb"(infe\x02.......)Exif|(infe\x03.......)Exif", re.DOTALL)


def _split_boxes(content: bytes) -> Parts:
    """Split AVIF, HEIC, JPEG XL or JPEG 2000. Their own orientation counts, so EXIF is left out."""
    place = 0
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4])
        if length == 1:
            length = int.from_bytes(content[place + 8 : place + 16])
        if length < 8:  # 0: to the end
            break
        if content.startswith(b"meta", place + 4):  # the item remains, of a kind that nobody looks at
            meta = _EXIF_ITEM.sub(lambda match: match[0][:-4] + b"free", content[place : place + length])
            content = content[:place] + meta + content[place + length :]
        place += length
    return Parts(content, is_cut=place > len(content))


_SPLIT: dict[str, Callable[[bytes], Parts]] = {
    "PNG": _split_png,
    "WEBP": _split_webp,
    "TIFF": _split_tiff,
    "AVIF": _split_boxes,
    "HEIC": _split_boxes,
    "JPEG XL": _split_boxes,
    "JPEG2000": _split_boxes,
}


def split(content: bytes, format: str) -> Parts:
    """Take a file of any format but JPEG apart."""
    return _SPLIT.get(format, Parts)(content)


# ------------------------------------------------------------------------------------------------------- JPEG

_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # except for those that are part of a scan
# Start-of-frame markers, with the kinds of JPEG that most decoders don't know.
_FRAMES = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC9, 0xCA), ""),
    **dict.fromkeys((0xC3, 0xCB), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
    0xF7: "JPEG-LS",
}
_PROGRESSIVE = (0xC2, 0xCA)
_ARITHMETIC = (0xC9, 0xCA, 0xCB)


@dataclass(frozen=True)
class Jpeg:
    """The parts of a JPEG file.

    Attributes:
        content: the picture without metadata, and with an end marker if the file has none.
        exif: the EXIF metadata; empty without any.
        height: in pixels.
        width: in pixels.
        channels: number of channels.
        kind: name of the kind of JPEG, if it is one that many decoders don't know; else empty.
        is_cut: whether scans are missing.
    """

    content: bytes
    exif: bytes
    height: int
    width: int
    channels: int
    kind: str
    is_cut: bool


def split_jpeg(content: bytes) -> Jpeg:
    """Take a JPEG file apart.

    Raises:
        EOFError: if it ends before the picture begins.
    """
    kept, exif, adobe, frame, place = [content[:2]], b"", -1, b"", 2
    while True:
        place = content.find(b"\xff", place)  # decoders pass over what lies between segments
        if place < 0 or place + 4 > len(content):
            raise EOFError("the file ends before the first scan")
        marker = content[place + 1]
        if marker == 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # padding, or without a length
            place += 1 if marker == 0xFF else 2
            continue
        if marker == _START_OF_SCAN:
            break
        end = place + 2 + max(2, int.from_bytes(content[place + 2 : place + 4]))
        if marker == 0xE1:
            if not exif and content.startswith(b"Exif\0", place + 4):
                exif = content[place + 10 : end]
        elif marker == 0xE0:
            if end - place >= 18 and content.startswith(b"JFIF\0", place + 4):
                kept.append(_JFIF)
        elif marker == 0xEE:
            if end - place >= 16 and content.startswith(b"Adobe", place + 4):
                adobe = content[place + 15]
        elif marker < 0xE0 or marker == 0xF7:
            kept.append(content[place:end])
            frame = content[place:end] if marker in _FRAMES else frame
        place = end
    if len(frame) < 10:
        raise ValueError("no frame header")
    _, marker, _, precision, height, width, channels = struct.unpack_from(">BBHBHHB", frame)
    if adobe >= 0:  # transformations that nobody knows count as the usual ones
        kept.insert(1, _ADOBE + bytes([adobe if adobe <= 2 else 2 if channels == 4 else 1]))
    kept.append(content[place:])
    if marker not in _ARITHMETIC:  # where a decoder takes whatever ends before its end marker as whole
        kept.append(_END)
    kind = _FRAMES[marker] or (f"{precision}-bit JPEG" if precision != 8 else "")
    in_scans = marker in _PROGRESSIVE or content[place + 4 : place + 5] != bytes([channels])
    is_cut = in_scans and not _has_all_scans(content, place, frame, progressive=marker in _PROGRESSIVE)
    return Jpeg(b"".join(kept), exif, height, width, channels, kind, is_cut)


def _has_all_scans(content: bytes, place: int, frame: bytes, *, progressive: bool) -> bool:
    """Return whether the scans from `place` on have all bits of all coefficients.

    Decoders do not check this: without the scans of the colors they show a gray picture, or else a blurred one.
    """
    left = {component: set(range(64)) for component in frame[10 : 10 + 3 * frame[9] : 3]}
    while place >= 0:
        marker = content[place + 1]
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4])
        if marker == 0xD9 or end > len(content):
            break
        if marker == _START_OF_SCAN:
            count = content[place + 4]
            components = content[place + 5 : place + 5 + 2 * count : 2]
            first, last, bits = content[end - 3 : end] if progressive else (0, 63, 0)
            for component in components if bits & 15 == 0 else b"":
                left.get(component, set()).difference_update(range(first, last + 1))
        match = _MARKER.search(content, end)
        place = match.start() if match else -1
    return not any(left.values())
