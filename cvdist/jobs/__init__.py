"""The jobs as functions: each takes its settings and returns a plain result.

    from cvdist import recipes
    from cvdist.jobs import train

    result = train(recipes.mnist_cnn(epochs=3))

A function is imported when it is first asked for, with all that it needs. It is called like the module that it
is in, and here the name means the function, whichever was imported first.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvdist.jobs.evaluate import EvaluateResult, evaluate
    from cvdist.jobs.export import ExportResult, export
    from cvdist.jobs.inspect import InspectResult, inspect
    from cvdist.jobs.predict import PredictResult, predict
    from cvdist.jobs.preflight import PreflightResult, preflight
    from cvdist.jobs.preprocess import PreprocessResult, preprocess
    from cvdist.jobs.probe import ProbeResult, probe
    from cvdist.jobs.replay import ReplayResult, replay
    from cvdist.jobs.report import ReportResult, report
    from cvdist.jobs.sweep import SweepResult, sweep
    from cvdist.jobs.train import TrainResult, train
    from cvdist.jobs.visualize import VisualizeResult, visualize

__all__ = [
    "EvaluateResult",
    "ExportResult",
    "InspectResult",
    "PredictResult",
    "PreflightResult",
    "PreprocessResult",
    "ProbeResult",
    "ReplayResult",
    "ReportResult",
    "SweepResult",
    "TrainResult",
    "VisualizeResult",
    "evaluate",
    "export",
    "inspect",
    "predict",
    "preflight",
    "preprocess",
    "probe",
    "replay",
    "report",
    "sweep",
    "train",
    "visualize",
]


class _Jobs(ModuleType):
    """This package, in which a job's name never means its module."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self.__name__}.{name.removesuffix('Result').lower()}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Having imported a submodule, Python binds it here.
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Jobs
