"""The convention of all benchmarks.

A benchmark is a module in this folder with a function `measure()` that yields `Comparison` objects. It runs our
side and the other side alternately, so that changes in the machine's speed affect both equally. The sides are
compared pair by pair: the reported ratio is the median of the pairs' ratios, with the lowest and highest as its
spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Comparison:
    """The result of comparing our side with another one.

    Attributes:
        name: what is compared.
        unit: unit of `ours` and `other`.
        ours: median of our side.
        other: median of the other side.
        ratio: median of the ratios of our side to the other.
        ratio_low: lowest of these ratios.
        ratio_high: highest of these ratios.
        target: value that `ratio` has to reach, or must not exceed if `at_most` is set.
        at_most: whether smaller ratios are better.
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
        """Whether the ratio meets the target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def to_dict(self) -> dict[str, object]:
        """Convert to a dictionary for the results file."""
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
    """Run both sides alternately.

    Args:
        name: what is compared.
        ours: runs our side and returns its measurement.
        other: runs the other side and returns its measurement.
        unit: unit of the measurements.
        target: value that the ratio has to reach, or must not exceed if `at_most` is set.
        pairs: number of pairs, after one that is a warm-up.
        at_most: whether smaller ratios are better.
    """
    measured = []
    for number in range(pairs + 1):
        # Who goes first alternates: the second of a pair may find warmer caches or a hotter processor.
        first, second = (ours, other) if number % 2 else (other, ours)
        figures = {first: first(), second: second()}
        if number:
            measured.append((figures[ours], figures[other]))
    return summarize(name, measured, unit=unit, target=target, at_most=at_most)


def summarize(
    name: str, measured: list[tuple[float, float]], *, unit: str, target: float, at_most: bool = False
) -> Comparison:
    """Summarize measured pairs (ours, other) as a comparison."""
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
    """Format comparisons as a table, one per line."""
    header = f"{'benchmark':52} {'ours':>11} {'other':>11} {'unit':10} {'ratio':>6} {'spread':>13}  target"
    lines = [header, "-" * len(header)]
    for c in comparisons:
        sign = "<=" if c.at_most else ">="
        lines.append(
            f"{c.name:52} {c.ours:>11,.5g} {c.other:>11,.5g} {c.unit:10} {c.ratio:>6.2f} "
            f"{c.ratio_low:>6.2f}-{c.ratio_high:<6.2f}  {sign}{c.target:g} {'' if c.met else 'MISSED'}"
        )
    return "\n".join(lines)
