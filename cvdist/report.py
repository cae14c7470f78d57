"""What a finished job prints: what it did, and what to do next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cvdist import log, recipes

if TYPE_CHECKING:
    from cvdist.config import TrainConfig
    from cvdist.runtime.launch import Finished, Preprocessed
    from cvdist.visualize import Shown

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


def figures_table(shown: Shown) -> str:
    """The same for a visualisation."""
    from cvdist.visualize import where

    study = shown.study
    rows = [
        ("model", shown.model),
        ("layers", ", ".join(layer.name for layer in shown.layers)),
        ("pictures", shown.pictures),
    ]
    if shown.bad:
        rows.append(("left out", f"{len(shown.bad)} can't be decoded, e.g. {log.redact(shown.bad[0])}"))
    if study is not None:
        dead = [f"{len(gone)}/{_channels(shown, name)} in {name}" for name, gone in study.dead.items() if gone]
        rows.append(("dead channels", f"{', '.join(dead) or 'none'}, over {study.seen} pictures"))
        if study.explained and study.right_in_all + study.wrong_in_all:
            total = study.right_in_all + study.wrong_in_all
            rows.append(("predictions", f"{log.percent(study.right_in_all, total)} right"))
    rows += [
        ("figures", f"{len(shown.files)} in {where(shown)}"),
        ("time", f"{log.duration(shown.seconds)} in all"),
    ]
    lines = _aligned(rows)
    if study is None:
        lines.append("next: the same with --data PICTURES, to see activations, exciting pictures and Grad-CAM")
    elif shown.run is not None and shown.run.tracking_uri.startswith("http"):
        lines.append(f"next: open {shown.run.page}/artifacts/figures")
    elif shown.run is not None:
        lines.append(f"next: make ui   then open http://localhost:5000/{shown.run.page}/artifacts")
    else:
        first = next((name for name in shown.files if name.startswith("gradcam/")), shown.files[0])
        lines.append(f"next: open {shown.output.rstrip('/')}/{first}; docs/seeing.md tells how to read them")
    return "\n".join(lines)


def _channels(shown: Shown, name: str) -> int:
    return next(layer.module.out_channels for layer in shown.layers if layer.name == name)


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
