"""HTML from elements: text is escaped wherever it is put, so that no place can forget to."""

from __future__ import annotations

import html
from collections.abc import Iterable

# Elements without content.
_VOID = ("img", "input", "meta", "wbr")


class Markup(str):
    """HTML that is ready. Any other string is text."""


def text(value: object) -> Markup:
    """`value` as text that is shown as it is, whatever is in it, and can be written as UTF-8."""
    if isinstance(value, Markup):
        return value
    # A file's name may hold bytes that are no text, which Python keeps as lone surrogates.
    shown = str(value).encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() or c in "\n\t " else f"\\x{ord(c):02x}" for c in shown)
    return Markup(html.escape(shown))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """`<name attributes>children</name>`.

    Attributes that are None or False are left out; of a trailing underscore (`class_`) only the name remains,
    and other underscores become hyphens.
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
    """The parts one after another, None left out."""
    return Markup(text(between).join(text(part) for part in parts if part is not None))
