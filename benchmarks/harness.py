"""One convention for all benchmarks.

A benchmark is a module in this folder with a function `measure()` that yields `Comparison`s. It runs ours and
the other side alternately in one run, so that a machine whose speed drifts does both the same favour, and
compares pair by pair: the ratio is the median of the pairs' ratios, with the lowest and highest as its spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Comparison:
    """Ours against another side.

    ours, other: medians, in `unit`; ratio: of ours to the other, median, lowest and highest over the pairs;
    target: what `ratio` has to reach, or with `at_most` must not exceed.
    """

    name: str
    unit: str
    ours: float
    other: float
    ratio: float
    ratio_low: float
    ratio_high: float
    target: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the ratio is what was promised."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def to_dict(self) -> dict[str, object]:
        """For the results file."""
        return asdict(self) | {"met": self.met}


def compare(
    name: str,
    ours: Callable[[], float],
    other: Callable[[], float],
    *,
    unit: str,
    target: float,
    pairs: int = 5,
    at_most: bool = False,
) -> Comparison:
    """Run both sides `pairs` times, in turn; each returns its figure. The first pair is a warm-up."""
    measured = []
    for number in range(pairs + 1):
        # Who goes first alternates: the second of a pair may find warmer caches or a hotter processor.
        first, second = (ours, other) if number % 2 else (other, ours)
        figures = {first: first(), second: second()}
        if number:
            measured.append((figures[ours], figures[other]))
    return summarise(name, measured, unit=unit, target=target, at_most=at_most)


def summarise(
    name: str, measured: list[tuple[float, float]], *, unit: str, target: float, at_most: bool = False
) -> Comparison:
    """The comparison of pairs (ours, other)."""
    ratios = [one / two for one, two in measured]
    return Comparison(
        name=name,
        unit=unit,
        ours=statistics.median(one for one, _ in measured),
        other=statistics.median(two for _, two in measured),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        target=target,
        at_most=at_most,
    )


def table(comparisons: list[Comparison]) -> str:
    """All results, one a line."""
    header = f"{'benchmark':52} {'ours':>11} {'other':>11} {'unit':10} {'ratio':>6} {'spread':>13}  target"
    lines = [header, "-" * len(header)]
    for c in comparisons:
        sign = "<=" if c.at_most else ">="
        lines.append(
            f"{c.name:52} {c.ours:>11,.5g} {c.other:>11,.5g} {c.unit:10} {c.ratio:>6.2f} "
            f"{c.ratio_low:>6.2f}-{c.ratio_high:<6.2f}  {sign}{c.target:g} {'' if c.met else 'MISSED'}"
        )
    return "\n".join(lines)
