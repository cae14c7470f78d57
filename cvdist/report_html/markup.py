"""Build HTML from elements. All text is escaped unless it is `Markup`, so that no caller can forget to."""

from __future__ import annotations

import html
from collections.abc import Iterable

# Elements that have no content and no end tag.
_VOID = ("img", "input", "meta", "wbr")


class Markup(str):
    """A string of finished HTML. Any other string is plain text that has to be escaped."""


def text(value: object) -> Markup:
    """Escape `value`, so that a browser shows it literally and it can be encoded as UTF-8.

    `Markup` stays as it is.
    """
    if isinstance(value, Markup):
        return value
    # File names may contain bytes that are not UTF-8, which Python represents as lone surrogates.
    shown = str(value).encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() or c in "\n\t " else f"\\x{ord(c):02x}" for c in shown)
    return Markup(html.escape(shown))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Build `<name attributes>children</name>`.

    Args:
        name: Name of the element.
        *children: Text or markup inside it. None is left out.
        **attributes: Attributes. A trailing underscore of a name is dropped (`class_`), other underscores
        become
            hyphens. Attributes with the value None or False are left out; of True, only the name is written.

    Returns:
        The element.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{text(value)}"')
    if name in _VOID:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Concatenate text and markup with `between` as separator. None is left out."""
    return Markup(text(between).join(text(part) for part in parts if part is not None))
