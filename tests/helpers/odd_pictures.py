"""A table of odd picture files: the bytes of each with its colors once it is upright, or why it is bad."""

from __future__ import annotations

import base64
import importlib.util
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.helpers import pictures
from tests.helpers.quarters import BLUE, GREEN, ORIENTED, RED, WHITE, encoded, quarters

CUT, DAMAGED = "truncated: ends within the picture", "damaged within the picture"
NO_PICTURE = "not a picture of any known kind"
UPRIGHT, TURNED = ORIENTED[1], ORIENTED[6]
END = b"\xff\xd9"
BYTE, ASCII, SHORT, LONG, RATIONAL, SBYTE, UNDEFINED, SSHORT, SLONG, FLOAT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 11
HAS_HEIC, HAS_JXL = (importlib.util.find_spec(name) is not None for name in ("pillow_heif", "pillow_jxl"))


@dataclass(frozen=True)
class Odd:
    """A file. `right`: colors of the four quarters, or the reason in the quarantine."""

    content: bytes
    right: tuple | str
    suffix: str = ".jpg"
    tolerance: int = 16


# ----------------------------------------------------------------------------------------------- parts of files


def entry(tag, kind, value, count=1, order="<"):
    """An entry of EXIF; `value`: a number, or the bytes of the value or its place."""
    letter = {BYTE: "B", SHORT: "H", LONG: "L", SBYTE: "b", SSHORT: "h", SLONG: "l", FLOAT: "f"}.get(kind, "L")
    packed = value if isinstance(value, bytes) else struct.pack(order + letter, value)
    return struct.pack(order + "HHL", tag, kind, count) + packed.ljust(4, b"\0")


def exif(*entries, order="<", following=0, count=None):
    """EXIF with one directory."""
    head = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order]
    number = len(entries) if count is None else count
    return head + struct.pack(order + "H", number) + b"".join(entries) + struct.pack(order + "L", following)


def oriented(value=6, kind=SHORT, order="<", count=1):
    return exif(entry(0x0112, kind, value, count, order), order=order)


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def app1(tiff):
    return segment(0xE1, b"Exif\0\0" + tiff)


def with_segments(*segments, content=None):
    """A JPEG with these segments right behind its start."""
    content = PLAIN if content is None else content
    return content[:2] + b"".join(segments) + content[2:]


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", checksum)


def png_with(*chunks, behind=False):
    """A PNG with these chunks before or behind its pixels."""
    place = PNG.index(b"IEND") - 4 if behind else PNG.index(b"IDAT") - 4
    return PNG[:place] + b"".join(chunks) + PNG[place:]


def riff(kind, content):
    return kind + struct.pack("<L", len(content)) + content + b"\0" * (len(content) % 2)


def webp_with(*chunks, flags=0x0C, size=None):
    """A WebP with these chunks behind its pixels."""
    body = riff(b"VP8X", bytes([flags, 0, 0, 0]) + (399).to_bytes(3, "little") + (299).to_bytes(3, "little"))
    body = b"WEBP" + body + WEBP[12:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<L", len(body) if size is None else size) + body


def tiff_with(*entries, order="<"):
    """An uncompressed TIFF of the quarters with these entries besides the necessary ones."""
    data = quarters(400, 300).tobytes()
    ours = [
        (256, 400),
        (257, 300),
        (258, 8),
        (259, 1),
        (262, 2),
        (273, 8),
        (277, 3),
        (278, 300),
        (279, len(data)),
    ]
    packed = [entry(tag, LONG, value, order=order) for tag, value in ours] + list(entries)
    packed.sort(key=lambda one: struct.unpack(order + "H", one[:2]))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8 + len(data))
    return head + data + struct.pack(order + "H", len(packed)) + b"".join(packed) + bytes(4)


def big_tiff(orientation):
    data = quarters(400, 300).tobytes()
    ours = [(256, 400), (257, 300), (258, 8), (259, 1), (262, 2), (273, 16), (274, orientation), (277, 3)]
    ours += [(278, 300), (279, len(data))]
    packed = b"".join(struct.pack("<HHQQ", tag, LONG, 1, value) for tag, value in ours)
    return (
        b"II+\0\x08\0\0\0"
        + struct.pack("<Q", 16 + len(data))
        + data
        + struct.pack("<Q", 10)
        + packed
        + bytes(8)
    )


def patched(content, place, new):
    return content[:place] + new + content[place + len(new) :]


def flipped(content, share=0.75):
    """Some bytes inverted, without a change of length."""
    start = int(len(content) * share)
    return patched(content, start, bytes(byte ^ 0xA5 for byte in content[start : start + 40]))


def share(content, part):
    return content[: int(len(content) * part)]


def frame(content, place, new):
    """A JPEG with other bytes in its frame header, from `place` on."""
    return patched(
        content, next(content.find(m) for m in (b"\xff\xc0", b"\xff\xc2") if m in content) + place, new
    )


def scans(content):
    """Where the scans of a JPEG begin."""
    return [i for i in range(len(content) - 1) if content[i : i + 2] == b"\xff\xda"]


def restarts(content):
    return [i for i in range(len(content) - 1) if content[i] == 0xFF and 0xD0 <= content[i + 1] <= 0xD7]


def photograph(**options):
    """Shapes with grain, so that there are bytes for each part of the picture."""
    grain = np.random.default_rng(0).integers(-24, 24, (300, 400, 3))
    values = np.asarray(quarters(400, 300), np.int64) + grain
    picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return encoded(picture.convert(options.pop("mode", "RGB")), **options)


def mpo(orientation):
    file = io.BytesIO()
    other = Image.new("RGB", (400, 300))
    quarters(400, 300).save(
        file, "MPO", save_all=True, append_images=[other], exif=b"Exif\0\0" + oriented(orientation)
    )
    return file.getvalue()


def frames(kind, **options):
    others = [Image.new("RGB", (400, 300), "black")]
    return encoded(quarters(400, 300), kind, save_all=True, append_images=others, **options)


PLAIN = encoded(quarters(400, 300))
PNG = encoded(quarters(400, 300), "PNG")
WEBP = encoded(quarters(400, 300), "WEBP", lossless=True)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
)
XMP_1 = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6)
X_RESOLUTION = entry(0x011A, ASCII, b"72\0", 3)
ORIENTATION = entry(0x0112, SHORT, 6)
ODD_TAGS = {
    "resolution in ascii": [ORIENTATION, X_RESOLUTION, entry(0x0128, SHORT, 2)],
    "all tags in ascii": [
        ORIENTATION,
        *(entry(tag, ASCII, b"x", 1) for tag in (0x10F, 0x11A, 0x11B, 0x128, 0x8769)),
    ],
    "all tags as floats": [
        ORIENTATION,
        *(entry(tag, FLOAT, 1.5) for tag in (0x10F, 0x11A, 0x11B, 0x128, 0x131)),
    ],
    "a type that is none": [ORIENTATION, entry(0x010F, 99, 1), entry(0x0131, 0, 1)],
    "values beyond the end": [
        ORIENTATION,
        entry(0x010F, ASCII, 2**31, 2**31 - 1),
        entry(0x011A, RATIONAL, 9**9),
    ],
    "a directory in itself": [
        ORIENTATION,
        entry(0x8769, LONG, 8),
        entry(0x8825, LONG, 8),
        entry(0xA005, LONG, 8),
    ],
    "a rational by zero": [ORIENTATION, entry(0x011A, RATIONAL, 0), entry(0x0128, SHORT, 3)],
}


# By libjpeg, whose options Pillow doesn't have: arithmetic coding, and colors at an eighth of the pixels.
ARITHMETIC = (
    b"c-"
    b"s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I^=Xi3x;&fCY$HIapa)SXjB(+1WUFxOjNDxwyG``Gf>``2_j6xdp@o1cgOJMMZh|#U;c<B!"
    b"omnML>oyG6VInuyV4pa*FVB^NNrR{-"
    b"0zJ<X~`MNML4EVqg+vWEN!ne};jJK|p|&Q9zLO|1Aa{W=5a{vmk>#!+(YgE}OLS;=4E3%)Y~(6SUiMU2xjnJ%PIEua7*xqH<5ot4"
    b"I4{cLisQc!s^v=F%$<{@(-u9l0^S"
)
EIGHTH = (
    b"c-"
    b"s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I^=Bjg6g+m4ls~os*M;i${c)hnt&6Qb?FzL{>^(PF6}rMnOeST|r4lSw=>~TvNxu(8R<<Uf"
    b"t5x!pKI?*u)5A2qPyaCl5D|1TU|Ik)n*E5y{~H0R}-"
    b"11_y=&W=0hTCP7AKLB{__7{q~21vwT8u(5LhB}4>JMS%b)Dgji>j4HtbRWFFC{uTodP%)Drvmk>#!&C;wxU2;raV`f2!8@10O3pY"
    b"i<h?!sVli(yz>ub?0Alk0zX<@jfHP7"
)


# --------------------------------------------------------------------------------------------------- the tables


def jpeg_orientations():
    for number, colors in ORIENTED.items():
        for order in "<>":
            yield f"exif {number} {order}", with_segments(app1(oriented(number, order=order))), colors
    for kind in (BYTE, SHORT, LONG, SBYTE, SSHORT, SLONG):
        for order in "<>":
            yield f"type {kind} {order}", with_segments(app1(oriented(6, kind, order))), TURNED
    for kind, value in ((ASCII, b"6\0"), (UNDEFINED, b"\6"), (FLOAT, 6.0), (RATIONAL, 8), (99, 6)):
        yield f"type {kind}", with_segments(app1(oriented(value, kind))), UPRIGHT
    for value in (0, 9, 99, 65535):
        yield f"value {value}", with_segments(app1(oriented(value))), UPRIGHT
    yield "negative", with_segments(app1(oriented(-6, SSHORT))), UPRIGHT
    yield "two values", with_segments(app1(oriented(6, count=2))), TURNED
    for order, kind, letter in (("<", SHORT, "H"), (">", SHORT, "H"), (">", SLONG, "l")):
        values = exif(entry(0x0112, kind, struct.pack(order + "L", 26), 3, order), order=order)
        three = values + struct.pack(order + 3 * letter, 6, 1, 1)
        yield f"three {letter} {order}", with_segments(app1(three)), TURNED
        yield f"three {letter} {order} that are not there", with_segments(app1(values)), UPRIGHT
    yield "no values", with_segments(app1(oriented(6, count=0))), UPRIGHT
    yield "xmp, then exif", with_segments(XMP_1, app1(oriented())), TURNED
    yield "exif, then xmp", with_segments(app1(oriented()), XMP_1), TURNED
    yield "exif says upright, xmp not", with_segments(XMP_1, app1(oriented(1))), UPRIGHT
    yield "xmp alone", with_segments(XMP_1), UPRIGHT
    yield "two exif", with_segments(app1(oriented()), app1(oriented(3))), TURNED
    yield "much before exif", with_segments(*[segment(0xEF, bytes(60_000))] * 5, app1(oriented())), TURNED
    yield "exif cut before", with_segments(app1(oriented()[:14])), UPRIGHT
    yield "exif cut behind", with_segments(app1(exif(ORIENTATION, count=9)[:22])), TURNED
    for tiff in (b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff\1\0", b"no EXIF at all", bytes(64)):
        yield f"exif is {tiff!r}", with_segments(app1(tiff)), UPRIGHT
    for name, entries in ODD_TAGS.items():
        yield name, with_segments(app1(exif(*entries))), TURNED
    yield "thumbnail", with_segments(app1(oriented() + pictures.jpeg(1))), TURNED
    yield "directories in a circle", with_segments(app1(exif(ORIENTATION, following=8))), TURNED
    yield "exif behind the tables", PLAIN.replace(b"\xff\xc0", app1(oriented()) + b"\xff\xc0", 1), TURNED
    yield "several pictures", mpo(6), TURNED


def jpeg_metadata():
    """Whatever stands there, the pixels are whole."""
    junk = bytes(range(256))
    for marker, start in (
        (0xE0, b"JFIF\0\7\1\0\0\1\0\1\0\0"), (0xE0, b"JFIF\0"), (0xE0, b"JFIF\0\1\1\0\0\1\0\1\xff\xff"),
        (0xE0, b"JFXX\0\x10"), (0xE1, b"Exif"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:"),
        (0xE1, b"http://ns.adobe.com/xmp/extension/\0"), (0xE2, b"ICC_PROFILE\0\2\1"), (0xE2, b"MPF\0"),
        (0xE2, b"ICC_PROFILE\0\0\0"), (0xE2, b"MPF\0II*\0\x08\0\0\0"), (0xE2, b"FPXR\0"), (0xEF, b""),
        (0xED, b"Photoshop 3.0\0"), (0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\xff\xff"), (0xEE, b"Adobe"),
        (0xFE, b"\xff\xfe"),
    ):  # fmt: skip
        for end in (b"", junk):
            odd = with_segments(app1(oriented()), segment(marker, start + end))
            yield f"{marker:x} {start[:20]!r} {len(end)}", odd, TURNED
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\x09")
    yield "adobe transformation 9", with_segments(adobe, content=without_jfif(PLAIN)), UPRIGHT
    yield "too short a length", with_segments(app1(oriented()), segment(0xE4, b"short") + b", not over"), TURNED
    yield "a length of zero", with_segments(b"\xff\xe5\0\0", app1(oriented())), TURNED
    yield "padding", with_segments(b"\xff\xff\xff", app1(oriented()), b"\xff\xff"), TURNED
    yield "junk behind", with_segments(app1(oriented())) + b"\xff\xd8\xff junk" * 9, TURNED
    yield "a page behind", PLAIN + b"<html></html>", UPRIGHT
    yield "wrong spectral selection", sequential(PLAIN), UPRIGHT


def without_jfif(content):
    return content[:2] + content[2 + 18 :]


def sequential(content):
    """Ends its spectral selection at 0 and not at 63, which decoders only warn of."""
    return patched(content, scans(content)[0] + 12, b"\0")


def jpeg_ends():
    kinds = {
        "plain": {}, "progressive": {"progressive": True}, "restarts": {"restart_marker_rows": 1},
        "gray": {"mode": "L"}, "cmyk": {"mode": "CMYK"}, "subsampled": {"subsampling": 2},
        "rgb": {"keep_rgb": True},
    }  # fmt: skip
    gray = tuple((v, v, v) for v in (82, 122, 44, 255))
    for kind, options in kinds.items():
        whole, colors = photograph(**options), gray if kind == "gray" else UPRIGHT
        yield f"{kind} whole", whole, colors, 30
        for missing in (1, 2):
            yield f"{kind} without {missing} of the end", whole[:-missing], colors, 30
        for part in (0.6, 0.99):
            yield f"{kind} cut at {part}", share(whole, part), CUT
            yield f"{kind} cut at {part}, with an end", share(whole, part) + END, CUT
        yield f"{kind} cut by 6 bytes, with an end", whole[:-6] + END, CUT
        yield f"{kind} more rows", frame(whole, 5, struct.pack(">H", 360)), CUT
        yield f"{kind} flipped", flipped(whole, 0.5), DAMAGED
        yield f"{kind} cut, turned", with_segments(app1(oriented()), content=share(whole, 0.6)), CUT
    whole = photograph()
    yield "fewer rows", frame(whole, 5, struct.pack(">H", 200)), DAMAGED
    yield "no rows", frame(whole, 5, b"\0\0"), DAMAGED
    yield "no columns", frame(whole, 7, b"\0\0"), DAMAGED
    yield "zeros from the middle", share(whole, 0.6).ljust(len(whole), b"\0"), DAMAGED
    yield "zeros from the middle, with an end", share(whole, 0.6).ljust(len(whole) - 2, b"\0") + END, DAMAGED
    yield "no quantization tables", whole.replace(b"\xff\xdb", b"\xff\xef"), DAMAGED
    yield "header alone", whole[: scans(whole)[0]], CUT
    yield "start alone", b"\xff\xd8", CUT
    yield "start and a byte", b"\xff\xd8\xff", CUT
    yield "start and end", b"\xff\xd8\xff\xd9", CUT
    progressive = photograph(progressive=True)
    for number, place in enumerate(scans(progressive)[1:]):
        yield f"progressive with {number + 1} scans", progressive[:place], CUT
        yield f"progressive with {number + 1} scans, with an end", progressive[:place] + END, CUT
    marked = photograph(restart_marker_rows=1)
    places = restarts(marked)
    yield "middle cut out at restarts", marked[: places[5]] + marked[places[9] :], DAMAGED
    yield "cut at a restart", marked[: places[9]], CUT
    yield "cut at a restart, with an end", marked[: places[9]] + END, CUT
    for place, new, kind in (
        (4, b"\x0c", "12-bit JPEG"), (1, b"\xc3", "lossless JPEG"), (1, b"\xc5", "hierarchical JPEG"),
        (1, b"\xf7", "JPEG-LS"),
    ):  # fmt: skip
        yield kind, frame(whole, place, new), f"a format that is not supported: {kind}"
    yield "arithmetic coding that is none", frame(whole, 1, b"\xc9"), DAMAGED
    for name, packed in (("arithmetic coding", ARITHMETIC), ("colors at an eighth", EIGHTH)):
        rare = zlib.decompress(base64.b85decode(packed))
        yield name, rare, UPRIGHT
        yield f"{name}, turned", with_segments(app1(oriented()), content=rare), TURNED
        yield f"{name}, cut", share(rare, 0.9), CUT


def pngs():
    for number, colors in ORIENTED.items():
        yield f"exif {number}", png_with(chunk(b"eXIf", oriented(number))), colors
    yield "exif behind the pixels", png_with(chunk(b"eXIf", oriented()), behind=True), TURNED
    yield "exif as in a JPEG", png_with(chunk(b"eXIf", b"Exif\0\0" + oriented())), TURNED
    yield "exif of type byte", png_with(chunk(b"eXIf", oriented(6, BYTE, ">"))), TURNED
    yield "exif with a wrong checksum", png_with(chunk(b"eXIf", oriented(), 1)), TURNED
    for name, entries in ODD_TAGS.items():
        yield name, png_with(chunk(b"eXIf", exif(*entries))), TURNED
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 6)
    yield "xmp alone", png_with(xmp), UPRIGHT
    yield "xmp and exif", png_with(xmp, chunk(b"eXIf", oriented(1))), UPRIGHT
    profile = b"\nexif\n      %d\n" % len(oriented()) + oriented().hex().encode()
    yield (
        "exif of imagemagick",
        png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
        TURNED,
    )
    for content in (
        b"Raw profile type exif\0\0junk",
        b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 1\nzz"),
    ):
        yield f"{content[-9:]!r} of imagemagick", png_with(chunk(b"zTXt", content)), UPRIGHT
    for kind in (
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"pHYs",
        b"tIME",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"eXIf",
        b"acTL",
        b"raND",
    ):
        for content in (b"", b"key\0" + bytes(range(256))):
            yield f"{kind} of {len(content)}", png_with(chunk(kind, content)), UPRIGHT
            yield f"{kind} of {len(content)}, wrong checksum", png_with(chunk(kind, content, 1)), UPRIGHT
            yield (
                f"{kind} of {len(content)}, wrong, behind",
                png_with(chunk(kind, content, 1), behind=True),
                UPRIGHT,
            )
    bomb = zlib.compress(bytes(100 << 20), 9)
    yield "a bomb as text", png_with(chunk(b"zTXt", b"key\0\0" + bomb)), UPRIGHT
    yield "a bomb as a profile", png_with(chunk(b"iCCP", b"key\0\0" + bomb)), UPRIGHT
    yield "a bomb as exif", png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)), UPRIGHT
    yield "no end", PNG[:-12], UPRIGHT
    yield "half an end", PNG[:-6], UPRIGHT
    yield "text cut at the end", png_with(chunk(b"tEXt", b"key\0value"), behind=True)[:-16], UPRIGHT
    yield "junk behind", PNG + b"junk" * 99, UPRIGHT
    yield "animated", frames("PNG"), UPRIGHT
    noise = photograph(kind="PNG", optimize=True)
    for part in (0.02, 0.6, 0.99):
        yield f"cut at {part}", share(noise, part), CUT
    yield "cut, with an end", share(noise, 0.6) + chunk(b"IEND", b""), CUT
    yield "flipped", flipped(noise), DAMAGED
    data = zlib.decompress(PNG[PNG.index(b"IDAT") + 4 : PNG.index(b"IEND") - 8])
    half = chunk(b"IDAT", zlib.compress(data[: len(data) // 2])) + chunk(b"IEND", b"")
    yield "half of the rows", PNG[: PNG.index(b"IDAT") - 4] + half, CUT
    for kind in ("RGB", "L", "1", "P", "RGBA", "I;16"):
        black = Image.new(kind, (400, 300), (0, 0, 0, 255) if kind == "RGBA" else 0)
        yield f"black {kind}", encoded(black, "PNG"), ((0, 0, 0),) * 4
    yield "a wrong header", patched(PNG, 20, b"\xff"), DAMAGED
    yield "no size", PNG[:8] + chunk(b"IHDR", bytes(8) + PNG[24:29]) + PNG[33:], DAMAGED
    yield "signature alone", PNG[:8], CUT


def webps():
    for number, colors in ORIENTED.items():
        yield f"exif {number}", webp_with(riff(b"EXIF", oriented(number))), colors
    yield "exif as in a JPEG", webp_with(riff(b"EXIF", b"Exif\0\0" + oriented(6, BYTE))), TURNED
    yield "exif without its flag", webp_with(riff(b"EXIF", oriented()), flags=0), TURNED
    yield "xmp alone", webp_with(riff(b"XMP ", XMP % 6)), UPRIGHT
    yield "xmp and exif", webp_with(riff(b"EXIF", oriented()), riff(b"XMP ", XMP % 3)), TURNED
    for name, entries in ODD_TAGS.items():
        yield name, webp_with(riff(b"EXIF", exif(*entries))), TURNED
    for kind in (b"EXIF", b"XMP ", b"ICCP", b"ABCD"):
        yield f"{kind} of junk", webp_with(riff(kind, bytes(range(255))), flags=0x2C), UPRIGHT
        yield f"{kind} beyond the end", webp_with(riff(kind, bytes(255))[:-99], flags=0x2C), UPRIGHT
    for size in (0, 100, 10**9):
        yield f"{size} bytes by its own account", webp_with(size=size), UPRIGHT
    yield "flags without chunks", webp_with(flags=0x2C), UPRIGHT
    yield "junk behind", WEBP + b"junk" * 99, UPRIGHT
    yield "animated", frames("WEBP", lossless=True), UPRIGHT
    for lossless in (False, True):
        whole = photograph(kind="WEBP", lossless=lossless)
        yield f"whole {lossless}", whole, UPRIGHT, 40
        for part in (0.02, 0.6, 0.99):
            yield f"cut at {part} {lossless}", share(whole, part), CUT


def tiffs():
    for number, colors in ORIENTED.items():
        yield f"orientation {number}", tiff_with(entry(0x0112, SHORT, number)), colors
        yield f"orientation {number} >", tiff_with(entry(0x0112, SHORT, number, order=">"), order=">"), colors
        yield f"orientation {number} big", big_tiff(number), colors
    yield "orientation of type byte", tiff_with(entry(0x0112, BYTE, 6)), TURNED
    yield "orientation of type long", tiff_with(entry(0x0112, LONG, 6)), TURNED
    yield "orientation twice", tiff_with(entry(0x0112, SHORT, 6, 2)), TURNED
    for name, entries in ODD_TAGS.items():
        if name != "a type that is none":  # libtiff's business; Pillow's own reader is asked here
            yield name, tiff_with(*entries), TURNED
    xmp = encoded(quarters(400, 300), "TIFF", tiffinfo={700: XMP % 6})
    yield "xmp alone", xmp, UPRIGHT
    for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        whole = photograph(kind="TIFF", compression=compression, tiffinfo={274: 6})
        yield f"{compression} whole", whole, TURNED, 40
        odd = photograph(
            kind="TIFF", compression=compression, tiffinfo={34675: b"no profile", 270: "\u732b", 33432: "x"}
        )
        yield f"{compression} odd", odd, UPRIGHT, 40
        for part in (0.01, 0.6, 0.99):
            yield f"{compression} cut at {part}", share(whole, part), CUT
    plain = photograph(kind="TIFF")
    for part in (0.02, 0.6, 0.99):
        yield f"cut at {part}", share(plain, part), CUT
    yield "pages", frames("TIFF"), UPRIGHT
    yield "no directory", b"II*\0\x08\0\0\0", CUT
    yield "an empty directory", b"II*\0\x08\0\0\0" + bytes(8), DAMAGED


def others():
    gif = encoded(quarters(400, 300), "GIF")
    for name, content in (
        ("gif", gif), ("gif with a comment", encoded(quarters(400, 300), "GIF", comment=b"\xff\xfe\0 caf\xe9")),
        ("gif without an end", gif[:-1]), ("gif animated", frames("GIF")),
        ("gif cut in its second frame", frames("GIF")[:-30]), ("bmp", encoded(quarters(400, 300), "BMP")),
        ("tga", encoded(quarters(400, 300), "TGA")), ("ppm", encoded(quarters(400, 300), "PPM")),
        ("jp2", encoded(quarters(400, 300), "JPEG2000")), ("ico", encoded(quarters(256, 256), "ICO")),
        ("avif", encoded(quarters(400, 300), "AVIF")),
        ("avif with odd exif", avif_with(b"none")),
        ("avif with xmp", encoded(quarters(400, 300), "AVIF", xmp=XMP % 6)),
    ):  # fmt: skip
        yield name, content, UPRIGHT, 30
    for number, colors in ORIENTED.items():
        yield f"avif {number}", encoded(quarters(400, 300), "AVIF", exif=oriented(number)), colors, 30
    for kind in ("GIF", "BMP", "TGA", "PPM", "JPEG2000", "AVIF"):
        whole = photograph(kind=kind)
        for part in (0.1, 0.6, 0.99):
            yield f"{kind} cut at {part}", share(whole, part), CUT
    yield "ico cut", share(encoded(quarters(256, 256), "ICO"), 0.6), DAMAGED


def avif_with(odd):
    """EXIF that is none, in the place of real one."""
    content = encoded(quarters(400, 300), "AVIF", exif=exif(entry(0x0131, ASCII, b"abc")))
    (order,) = [order for order in (b"II*\0", b"MM\0*") if order in content]
    return content.replace(order, odd)


def modes():
    """Of numbers and colors."""
    picture, gray = quarters(400, 300), tuple((v, v, v) for v in (82, 122, 44, 255))
    levels = np.asarray(picture.convert("L"))
    palette = picture.quantize(4)
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    lab = Image.merge("LAB", [Image.fromarray(levels), *[Image.new("L", (400, 300), 128)] * 2])
    yield "16 bits", encoded(deep, "PNG"), gray
    yield "16 bits, tiff", encoded(deep, "TIFF"), gray
    yield "32 bits", encoded(Image.fromarray(levels.astype(np.int32) * 257), "TIFF"), gray
    yield "floats", encoded(Image.fromarray((levels / 255).astype(np.float32)), "TIFF"), gray
    yield "alpha", encoded(picture.convert("RGBA"), "PNG"), UPRIGHT
    yield "palette", encoded(palette, "PNG"), UPRIGHT
    first = palette.getpixel((1, 1))
    yield "palette with alpha", encoded(palette, "PNG", transparency=first), (WHITE, GREEN, BLUE, WHITE)
    yield "gray with alpha", encoded(picture.convert("L").convert("LA"), "PNG"), gray
    yield "one bit", encoded(Image.fromarray(levels > 100), "PNG"), tuple((v,) * 3 for v in (0, 255, 0, 255))
    yield "cmyk jpeg", encoded(picture.convert("CMYK")), UPRIGHT, 30
    yield "cmyk tiff", encoded(picture.convert("CMYK"), "TIFF"), UPRIGHT, 30
    yield "lab", encoded(lab, "TIFF"), gray, 40
    yield "rgb jpeg", encoded(picture, keep_rgb=True), UPRIGHT
    yield "progressive", encoded(picture, progressive=True), UPRIGHT
    for size in ((1, 1), (1, 300), (300, 1), (3000, 7), (7, 3000), (16, 9)):
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
            yield f"{size} {kind}", encoded(Image.new("RGB", size, RED), kind), (RED,) * 4


def no_pictures():
    unsupported = "a format that is not supported: "
    yield "empty", b"", "0 bytes"
    for name, content, right in (
        ("page", b"<!DOCTYPE html><html><body>404</body></html>", "HTML"), ("page 2", b"\n\n <html>", "HTML"),
        ("page 3", b"\xef\xbb\xbf<!doctype HTML PUBLIC>", "HTML"), ("page 4", b"<head><title>x", "HTML"),
        ("page 5", b'<?xml version="1.0"?><!DOCTYPE html><html>', "HTML"),
        ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        ("json", b'{"error": "not found"}', "JSON"), ("json 2", b'[{"a": 1}]', "JSON"),
        ("json 3", b"{}", "JSON"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        ("text", b"Not found", "text"), ("text with an end", b"no picture\xff\xd9", "text"),
        ("zip", b"PK\3\4" + bytes(99), "a ZIP archive"), ("gzip", b"\x1f\x8b" + bytes(99), "a gzip archive"),
        ("video", b"\0\0\0\x18ftypisom" + bytes(99), "a video"), ("zeros", bytes(5000), "nothing but zeros"),
    ):  # fmt: skip
        yield name, content, f"not a picture: {right}"
    for name, content, right in (
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        ("svg 2", b'<?xml version="1.0"?>\n<svg>', "SVG"), ("pdf", b"%PDF-1.4", "PDF"),
        ("psd", b"8BPS\0\1", "PSD"),
        ("cr2", b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "camera raw"),
        ("raf", b"FUJIFILMCCD-RAW " + bytes(99), "camera raw"),
        ("cr3", b"\0\0\0\x18ftypcrx " + bytes(99), "camera raw"),
        ("orf", b"IIRO\x08\0\0\0" + bytes(99), "camera raw"),
    ):  # fmt: skip
        yield name, content, unsupported + right
    yield "random", np.random.default_rng(1).bytes(5000), NO_PICTURE
    if not HAS_HEIC:
        yield "heic", b"\0\0\0\x18ftypheic" + bytes(99), f"{unsupported}HEIC without the extra heif"
    if not HAS_JXL:
        yield "jxl", b"\xff\x0a" + bytes(99), f"{unsupported}JPEG XL without the extra jxl"


def with_extras():
    if HAS_HEIC:
        import pillow_heif

        def heic(**options):
            file = io.BytesIO()
            pillow_heif.from_pillow(quarters(400, 300)).save(file, quality=95, **options)
            return file.getvalue()

        yield "heic", heic(exif=b"Exif\0\0" + oriented(1)), UPRIGHT, 30
        yield "heic turned in exif", heic(exif=b"Exif\0\0" + oriented(6)), TURNED, 30  # and in the file
        yield "heic with odd exif", heic(exif=b"no exif at all"), UPRIGHT, 30
        for part in (0.1, 0.6, 0.99):
            yield f"heic cut at {part}", share(heic(), part), CUT
    if HAS_JXL:
        import pillow_jxl

        yield "jxl", encoded(quarters(400, 300), "JXL", lossless=True), UPRIGHT
        yield "jxl with alpha", encoded(quarters(400, 300, mode="RGBA"), "JXL", lossless=True), UPRIGHT
        yield "jxl with odd exif", encoded(quarters(400, 300), "JXL", exif=b"Exif\0\0no exif"), UPRIGHT, 30
        for name, tiff in (("turned", oriented()), ("odd", exif(*ODD_TAGS["resolution in ascii"]))):
            encoder = pillow_jxl.Encoder(mode="RGB", lossless=True, num_threads=1)
            jpeg = with_segments(app1(tiff))
            yield f"jxl of a jpeg, {name}", encoder(jpeg, 400, 300, jpeg_encode=True), TURNED


def table():
    """All rows by the path of their file."""
    rows = {}
    suffixes = {
        jpeg_orientations: ".jpg",
        jpeg_metadata: ".JPG",
        jpeg_ends: ".jpeg",
        pngs: ".png",
        webps: ".webp",
    }
    for group in (*suffixes, tiffs, others, modes, no_pictures, with_extras):
        for name, content, right, *tolerance in group():
            # Most have the suffix of another format; names have blanks, '#', '%20' and other scripts.
            plain = "".join(c if c.isalnum() or c in " .,#%<>-" else "_" for c in name[:60])
            path = f"{group.__name__} {plain} #{len(rows)} %20 \u732b{suffixes.get(group, '.Jpg')}"
            assert path not in rows
            rows[path] = Odd(content, right, *([".jpg", *tolerance] if tolerance else []))
    return rows
