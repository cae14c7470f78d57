"""The page of an inspection: self-contained, and safe whatever files are called."""

from __future__ import annotations

import base64
import hashlib
import io

import torch
from PIL import Image

from cvdist.report_html.inspection import SIDE, Finding, InspectionPage, Section, render, thumbnail
from tests.helpers.report_pages import HOSTILE, Parsed


def picture(width, height, path="train/a/1.jpg"):
    pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return thumbnail(pixels, width, height, path, "a", "training")


def page(name="Inspection of pets", path="train/a/1.jpg"):
    findings = (
        Finding(picture(400, 300, path), "nearly the same", picture(200, 300, path)),
        Finding(picture(50, 500, path), path),
    )
    section = Section("Copies, and more", "What they are.", findings, 9)
    return InspectionPage(name, name, {"pictures": "1,000"}, (name,), name, (section,))


def test_thumbnails_keep_their_proportions():
    wide, tall = picture(4000, 1000), picture(1, 3000)
    assert (wide.width, wide.height) == (SIDE, SIDE // 4) and (tall.width, tall.height) == (1, SIDE)
    with Image.open(io.BytesIO(base64.b64decode(wide.uri.partition(",")[2]))) as image:
        assert image.size == (wide.width, wide.height) and image.format == "JPEG"


def test_the_page_loads_nothing_and_shows_names_as_text():
    text = render(page(HOSTILE, HOSTILE))
    parsed, plain = Parsed(text), Parsed(render(page()))
    assert len(parsed.all("script")) == len(plain.all("script")) == 1
    assert not any(key.startswith("on") for _, attributes in parsed.elements for key in attributes)
    loading = [
        a.get(key, "") for _, a in parsed.elements for key in ("src", "srcset", "href", "poster", "data")
    ]
    assert all(not value or value.startswith(("data:image/jpeg", "#")) for value in loading)
    assert parsed.text.count("<script>alert(1)</script>") >= 6
    # The browser runs the page's own script and no other.
    code = text.partition("<script>")[2].partition("</script>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" in text


def test_links_lead_to_sections_and_what_is_not_shown_is_counted():
    parsed = Parsed(render(page()))
    identifiers = {a["id"] for _, a in parsed.elements if "id" in a}
    links = [a["href"].removeprefix("#") for a in parsed.all("a")]
    assert links and set(links) <= identifiers
    assert len(parsed.all("img")) == 3 and "7 more are in issues.csv" in parsed.text
    empty = InspectionPage("Inspection", "", {}, (), "", ())
    assert "Nothing was found" in Parsed(render(empty)).text
