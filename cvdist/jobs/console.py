"""Layout of what finished jobs print: aligned rows, columns, and the way to an MLflow run."""

from __future__ import annotations

from collections.abc import Sequence

from cvdist import log
from cvdist.tracking import RunRef


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a table of two columns, between empty lines."""
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:{width}}  {value}" for name, value in rows), ""]


def columns(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    return [
        "  " + "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in [header, *table]
    ]


def share(count: int, total: int) -> str:
    """`75.00% (3/4)`, also where there is nothing to count."""
    return log.percent(count, total) if total else "- (0/0)"


def mlflow_row(run: RunRef | None) -> list[tuple[str, str]]:
    """The row that says where the run is in MLflow; none without a run."""
    if run is None:
        return []
    return [("MLflow", run.page if _has_server(run) else run.tracking_uri)]


def open_run(run: RunRef) -> str:
    """The line that tells how to see the run in MLflow."""
    if _has_server(run):
        return f"open {run.page}"
    return f"make ui   then open http://localhost:5000/{run.page}"


def _has_server(run: RunRef) -> bool:
    return run.tracking_uri.startswith("http")
