"""The values that a setting may have, stated beside its default: `epochs: Annotated[int, at_least(1)] = 20`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers.

    Args:
        low: its lower end.
        high: its upper end.
        brackets: `[` or `]` where the end belongs to the interval, `(` or `)` where it does not.
        or_zero: whether 0, with a meaning of its own, belongs to it as well.
    """

    low: float
    high: float = math.inf
    brackets: str = "[]"
    or_zero: bool = False

    def __contains__(self, value: float) -> bool:
        """Return whether `value` lies in the interval."""
        if self.or_zero and value == 0:
            return True
        return self.low < value < self.high or (value in (self.low, self.high) and self._includes(value))

    def __str__(self) -> str:
        """Return the interval in words that follow `it takes`."""
        if self.high == math.inf:
            zero = ", or 0" if self.or_zero else ""
            return f"{self.low:g} or more{zero}" if self._includes(self.low) else f"a number above {self.low:g}"
        return f"a number in {self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"

    def _includes(self, end: float) -> bool:
        return self.brackets[0] == "[" if end == self.low else self.brackets[1] == "]"


@dataclass(frozen=True)
class Pattern:
    """Texts that match a regular expression. words: describe these texts, to follow `it takes`."""

    expression: str
    words: str

    def __contains__(self, value: str | int) -> bool:
        """Return whether all of `value` matches."""
        return re.fullmatch(self.expression, str(value)) is not None

    def __str__(self) -> str:
        """Return the words that describe the texts and follow `it takes`."""
        return self.words


def at_least(low: float) -> Bounds:
    """Return the interval of the numbers from `low` on, `low` included, without an upper end."""
    return Bounds(low)


def above(low: float) -> Bounds:
    """Return the interval of the numbers above `low`, without an upper end."""
    return Bounds(low, brackets="(]")


# Types that several groups of settings use.
Fraction = Annotated[float, Bounds(0, 1)]
Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
"""A number of which 0 has a meaning of its own."""
Seconds = Annotated[float, at_least(1)]
AnswerSeconds = Annotated[float, at_least(0.1)]
"""How long a server may take to answer."""
WaitSeconds = Annotated[float, at_least(0)]
"""How long a job may wait; 0: not at all."""
_RESIZE = r"squash|crop|crop:[1-9]\d*:(bilinear|bicubic)"
Resize = Annotated[str, Pattern(rf"weights|{_RESIZE}", "squash, crop, weights, or such as crop:256:bilinear")]
"""How photographs become square."""
ResizeOrEmpty = Annotated[str, Pattern(rf"|{_RESIZE}", "squash, crop, or such as crop:256:bilinear")]
