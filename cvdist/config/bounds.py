"""What a number may be, said where its default is: `epochs: Annotated[int, at_least(1)] = 20`."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

from cvdist.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """From `low` to `high`. brackets: as in mathematics, `[` and `]` take the bound itself in."""

    low: float
    high: float = math.inf
    brackets: str = "[]"

    def __contains__(self, value: float) -> bool:
        """Whether a value may be that."""
        return self.low < value < self.high or (value in (self.low, self.high) and self._takes(value))

    def __str__(self) -> str:
        """As in `it takes ...`."""
        if self.high == math.inf:
            return f"{self.low:g} or more" if self._takes(self.low) else f"a number above {self.low:g}"
        return f"a number in {self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"

    def _takes(self, bound: float) -> bool:
        return self.brackets[0] == "[" if bound == self.low else self.brackets[1] == "]"


def at_least(low: float) -> Bounds:
    """`low` itself, or more."""
    return Bounds(low)


def above(low: float) -> Bounds:
    """More than `low`."""
    return Bounds(low, brackets="(]")


def between(low: float, high: float, brackets: str = "[]") -> Bounds:
    """See `Bounds`."""
    return Bounds(low, high, brackets)


def check_groups(settings: Any) -> None:
    """Refuse values that no job can work with; `settings`: a dataclass of groups.

    Raises:
        UserError: one line that names the flag and what it takes.
    """
    for part in dataclasses.fields(settings):
        check_values(getattr(settings, part.name))


def check_values(group: Any) -> None:
    """The same for one group, a dataclass of plain values.

    Raises:
        UserError: as `check_groups`.
    """
    for name, hint in typing.get_type_hints(type(group), include_extras=True).items():
        flag, value = "--" + name.replace("_", "-"), getattr(group, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} is {value}: it takes a finite number")
        for bounds in getattr(hint, "__metadata__", ()):
            if isinstance(bounds, Bounds) and value not in bounds:
                raise UserError(f"{flag} is {value}: it takes {bounds}")
