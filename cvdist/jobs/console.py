"""Layout of what finished jobs print: aligned rows, columns, and the way to an MLflow run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cvdist import log
from cvdist.log import redact
from cvdist.tracking import RunRef

_LOCAL = "http://localhost:5000/"
_OF_A_CLONE = ("Makefile", "jobs/train.py")


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Format a table of two columns as lines, between empty lines."""
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:{width}}  {value}" for name, value in rows), ""]


def columns(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Format a table as lines: the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    return [
        "  " + "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in [header, *table]
    ]


def share(count: int, total: int) -> str:
    """Format a share as `75.00% (3/4)`, or `- (0/0)` where there is nothing to count."""
    return log.percent(count, total) if total else "- (0/0)"


def mlflow_row(run: RunRef | None) -> list[tuple[str, str]]:
    """Return a list of the row that says where the run is in MLflow; an empty list without a run."""
    if run is None:
        return []
    return [("MLflow", run.page() if _has_server(run) else redact(run.tracking_uri))]


def open_run(run: RunRef) -> str:
    """Return the line that tells how to see the run in MLflow."""
    return f"open {run.page()}" if _has_server(run) else f"{_ui(run)}   then open {_LOCAL}{run.page()}"


def all_runs(run: RunRef) -> str:
    """Return the address of the table of all runs."""
    return run.runs_page() if _has_server(run) else f"{_LOCAL}{run.runs_page()}"


def page_after(run: RunRef, tab: str = "") -> str:
    """Return the address of a tab of the run and, where there is no server, the command that starts one."""
    return run.page(tab) if _has_server(run) else f"{_LOCAL}{run.page(tab)} (after {_ui(run)})"


def _ui(run: RunRef) -> str:
    """Return the command that starts MLflow's UI on the run's store."""
    here = Path.cwd()
    usual = f"{os.environ.get('CVDIST_STORAGE') or here / 'runs'}/mlflow.db"
    if run.tracking_uri == f"sqlite:///{usual}" and all((here / name).is_file() for name in _OF_A_CLONE):
        return "make ui"
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    return f"{program} ui --backend-store-uri {shlex.quote(redact(run.tracking_uri))} --port 5000"


def _has_server(run: RunRef) -> bool:
    return run.tracking_uri.startswith("http")
