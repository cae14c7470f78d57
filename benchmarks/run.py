"""`make bench [ONLY=name]`: runs benchmarks, prints a table, writes results.json, fails on missed targets."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from benchmarks.harness import Comparison, table  # noqa: E402

_NOT_BENCHMARKS = {*("cost_model", "harness", "made_up_features", "photographs", "run", "scaling_worker")}


def main() -> int:
    """Run the benchmarks that the command line names, or all, and return the exit code."""
    known = sorted({module.name for module in pkgutil.iter_modules([str(FOLDER)])} - _NOT_BENCHMARKS)
    chosen = sys.argv[1:] or known
    if unknown := set(chosen) - set(known):
        print(f"error: no benchmark named {', '.join(unknown)}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    results: list[Comparison] = []
    for name in chosen:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}", flush=True)
        started = time.monotonic()
        for comparison in module.measure():
            results.append(comparison)
            print(f"  {comparison.name}: {comparison.ratio:.2f}", flush=True)
        print(f"  took {time.monotonic() - started:.0f} s", flush=True)
    print("\n" + table(results))
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    path = FOLDER / "results.json"
    path.write_text(json.dumps({"machine": machine, "results": [r.to_dict() for r in results]}, indent=1))
    missed = [r.name for r in results if not r.met]
    if missed:
        print(f"\nmissed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
