"""What a finished job prints: what it did, and what to do next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cvdist import log, recipes

if TYPE_CHECKING:
    from cvdist.config import TrainConfig
    from cvdist.runtime.launch import Finished, Preprocessed
    from cvdist.runtime.prediction import Finished as PredictionFinished

_SHOWN_CLASSES = 10
_OF_THE_NODE = ("data", "cache", "cache_share", "decode_workers", "max_bad_images")  # no part of the features


def table(finished: Finished) -> str:
    """A table of two columns, and the next command below it."""
    summary, run = finished.summary, finished.run
    rows = [
        ("run", finished.name),
        ("data", summary.data),
        ("model", summary.model),
        ("workers", f"{summary.workers} on {summary.hardware}"),
        ("epochs", str(summary.epochs)),
        (
            "best accuracy",
            f"{log.percent(summary.best_correct, summary.valid_total)} at epoch {summary.best_epoch}",
        ),
        (
            "time",
            f"{log.duration(finished.seconds)} in all, first step after "
            f"{finished.seconds_to_first_step:.1f} s, {log.duration(summary.train_seconds)} of training",
        ),
        ("speed", f"{summary.samples_per_second:,.0f} samples/s"),
        ("checkpoints", f"{finished.storage}/{finished.name}"),
    ]
    if run is not None:
        rows.append(("MLflow", run.page if run.tracking_uri.startswith("http") else run.tracking_uri))
    lines = _aligned(rows)
    if run is None:
        lines.append("next: the same with MLflow, to see curves, mistakes and the model: --tracking required")
    elif run.tracking_uri.startswith("http"):
        lines.append(f"next: open {run.page}")
    else:
        lines.append(f"next: make ui   then open http://localhost:5000/{run.page}")
    return "\n".join(lines)


def features_table(done: Preprocessed) -> str:
    """The same for an extraction."""
    cache, built, config = done.built.manifest, done.built, done.config
    uri = log.redact(config.features.features)
    rate = f", {built.computed / built.seconds:,.1f} images/s" if built.computed else ""
    good = cache.index.rows - len(cache.bad)
    rows = [
        ("features", uri),
        ("pictures", f"{good:,} of {cache.index.rows:,}, {len(cache.bad)} can't be decoded"),
        ("computed", f"{built.computed:,} pictures in {log.duration(built.seconds)}{rate}"),
        ("stored", f"{cache.stored_bytes / 1e6:,.1f} MB in {len(cache.shards)} shards, "
                   f"{cache.stored_bytes / 1e3 / max(good, 1):,.2f} kB a picture"),
        ("time", f"{log.duration(done.seconds)} in all"),
    ]  # fmt: skip
    lines = _aligned(rows)
    lines.append(f"next: python jobs/train.py {config.recipe} --features {uri}{_flags(config)}")
    return "\n".join(lines)


def predictions_table(finished: PredictionFinished) -> str:
    """The same for a batch prediction."""
    done, saved, config = finished.predicted, finished.saved, finished.config
    output = log.redact(config.prediction.output).rstrip("/")
    rate = f", {done.computed / done.seconds:,.1f} images/s" if done.computed else ""
    most = sorted(done.counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} {count:,}" for name, count in most[:_SHOWN_CLASSES] if count)
    more = sum(count > 0 for _, count in most[_SHOWN_CLASSES:])
    stale = f", {done.removed} stale deleted" if done.removed else ""
    size = sum(part.bytes for part in done.parts)
    total = done.rows + len(done.bad)
    rows = [
        ("model", f"{saved.source}: {saved.identity}"),
        ("pictures", f"{done.rows:,} of {total:,}, {len(done.bad)} can't be decoded (quarantine.csv)"),
        ("classes", (named or "none") + (f" and {more} more" if more else "")),
        ("computed", f"{done.computed:,} pictures in {log.duration(done.seconds)}{rate}"),
        ("results", f"{output}/predictions: {len(done.parts)} files, {size / 1e6:,.2f} MB{stale}"),
        ("time", f"{log.duration(finished.seconds)} in all"),
    ]
    lines = _aligned(rows)
    lines.append(f"next: python -c \"import pandas; print(pandas.read_parquet('{output}/predictions'))\"")
    return "\n".join(lines)


def _flags(config: TrainConfig) -> str:
    """What the features depend on and the recipe has otherwise, for a command that trains from them."""
    usual = recipes.find(config.recipe)
    flags = ""
    for group in ("data", "model"):
        for field in dataclasses.fields(getattr(config, group)):
            value = getattr(getattr(config, group), field.name)
            if field.name not in _OF_THE_NODE and value != getattr(getattr(usual, group), field.name):
                flags += f" --{field.name.replace('_', '-')} {log.redact(str(value))}"
    return flags


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:{width}}  {value}" for name, value in rows), ""]
