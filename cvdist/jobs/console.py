"""What a finished job prints: what it did, and what to do next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, get_args

from cvdist import log, recipes
from cvdist.sweep import space
from cvdist.sweep.record import TrialState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cvdist.config import TrainConfig
    from cvdist.evaluation.measure import Measured
    from cvdist.jobs.evaluate import Finished as EvaluationFinished
    from cvdist.jobs.predict import Finished as PredictionFinished
    from cvdist.jobs.sweep import Finished as SweepFinished
    from cvdist.jobs.train import Finished, Preprocessed
    from cvdist.jobs.visualize import Shown

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
        *([("ridge probe", f"{summary.ridge}, without an epoch")] if summary.ridge else []),
        (
            "time",
            f"{log.duration(finished.seconds)} in all, first step after "
            f"{finished.seconds_to_first_step:.1f} s, {log.duration(summary.train_seconds)} of training",
        ),
        ("speed", f"{summary.samples_per_second:,.0f} samples/s"),
        ("checkpoints", f"{finished.storage}/{finished.name}"),
    ]
    if summary.slow_requests:
        rows.append(("storage", str(summary.slow_requests)))
    if run is not None:
        rows.append(("MLflow", run.page if run.tracking_uri.startswith("http") else run.tracking_uri))
    if finished.registered:
        rows.append(("registered", finished.registered))
    lines = _aligned(rows)
    if run is None:
        lines.append("next: the same with MLflow, to see curves, mistakes and the model: --tracking required")
    elif run.tracking_uri.startswith("http"):
        lines.append(f"next: open {run.page}")
    else:
        lines.append(f"next: make ui   then open http://localhost:5000/{run.page}")
    return "\n".join(lines)


def sweep_table(finished: SweepFinished) -> str:
    """The same for a sweep."""
    best, job, trained = finished.best, finished.job, finished.trained
    name = job.train.checkpoint.name
    count = {state: sum(trial.state == state for trial in finished.trials) for state in get_args(TrialState)}
    ends = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    epochs = sum(len(trial.epochs) for trial in finished.trials)
    whole = len(finished.trials) * (job.sweep.trial_epochs or job.train.loop.epochs)
    assert best.best is not None
    rows = [
        ("sweep", name),
        ("trials", f"{len(finished.trials)}: {ends}; {epochs} of {whole} epochs trained"),
        ("best", f"trial {best.number}: {space.format_settings(best.settings)}"),
        ("", f"{log.percent(best.best.correct, best.best.total)} at epoch {best.best.epoch}"),
    ]
    if trained is not None:
        summary = trained.summary
        result = log.percent(summary.best_correct, summary.valid_total)
        rows.append(("trained on", f"{trained.name}: {result} at epoch {summary.best_epoch}"))
    rows.append(("time", f"{log.duration(finished.seconds)} in all"))
    if trained is not None:
        rows.append(("checkpoints", f"{trained.storage}/{trained.name}"))
    elif finished.checkpoint:
        rows.append(("checkpoint", finished.checkpoint))
    run = finished.run
    if run is not None:
        rows.append(("MLflow", run.page if run.tracking_uri.startswith("http") else run.tracking_uri))
    if trained is not None and trained.registered:
        rows.append(("registered", trained.registered))
    lines = _aligned(rows)
    if trained is None:
        resume = f" --resume {finished.checkpoint}" if finished.checkpoint else ""
        lines.append(
            f"next: the sweep's command without --no-train-best, or one training: python jobs/train.py "
            f"{job.train.recipe} {space.format_flags(best.settings)}{resume} and the sweep's other flags"
        )
        return "\n".join(lines)
    if run is None:
        lines.append(f"next: python jobs/evaluate.py {trained.storage}/{trained.name}")
    else:
        where = run.page if run.tracking_uri.startswith("http") else f"http://localhost:5000/{run.page}"
        start = "" if run.tracking_uri.startswith("http") else "make ui   then "
        lines.append(f"next: {start}open {where}, and python jobs/evaluate.py {trained.name}")
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
    from cvdist.jobs.visualize import where

    interpretation = shown.interpretation
    rows = [
        ("model", shown.model),
        ("layers", ", ".join(layer.name for layer in shown.layers)),
        ("pictures", shown.pictures),
    ]
    if shown.bad:
        rows.append(("left out", f"{len(shown.bad)} can't be decoded, e.g. {log.redact(shown.bad[0])}"))
    if interpretation is not None:
        dead = [
            f"{len(gone)}/{_channels(shown, name)} in {name}"
            for name, gone in interpretation.dead.items()
            if gone
        ]
        rows.append(("dead channels", f"{', '.join(dead) or 'none'}, over {interpretation.seen} pictures"))
        if interpretation.has_classifier and interpretation.num_correct + interpretation.num_wrong:
            total = interpretation.num_correct + interpretation.num_wrong
            rows.append(("predictions", f"{log.percent(interpretation.num_correct, total)} right"))
    rows += [
        ("figures", f"{len(shown.files)} in {where(shown)}"),
        ("time", f"{log.duration(shown.seconds)} in all"),
    ]
    lines = _aligned(rows)
    if interpretation is None:
        lines.append("next: the same with --data PICTURES, to see activations, top activations and Grad-CAM")
    elif shown.run is not None:
        page = f"http://localhost:5000/{shown.run.page}"
        at = shown.run.page if shown.run.tracking_uri.startswith("http") else f"{page} (after make ui)"
        lines.append(f"next: open {at}, whose report.html has the new figures")
    else:
        first = next((name for name in shown.files if name.startswith("gradcam/")), shown.files[0])
        lines.append(f"next: open {shown.output.rstrip('/')}/{first}; docs/seeing.md tells how to read them")
    return "\n".join(lines)


def _channels(shown: Shown, name: str) -> int:
    return next(layer.module.out_channels for layer in shown.layers if layer.name == name)


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


def evaluation_table(finished: EvaluationFinished) -> str:
    """The same for an evaluation: figures, classes, and, with two models, where they differ."""
    evaluation, config = finished.evaluation, finished.config
    models = [one for one in (evaluation.first, evaluation.second) if one is not None]
    names = ["model"] if len(models) == 1 else ["A", "B"]
    rows = [
        (name, f"{one.saved.source}: {one.saved.identity}") for name, one in zip(names, models, strict=True)
    ]
    bad = len(evaluation.pictures.quarantine)
    seen = evaluation.first.metrics.total
    rows.append(("data", f"{evaluation.pictures.name}: {seen:,} pictures, {bad} more can't be decoded"))
    if absent := evaluation.first.absent:
        rows.append(("no pictures of", f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"))
    lines = _aligned(rows) + _columns(["", *names[: len(models)]], _results(models))
    lines += ["", *_columns(*_by_class(models, names)), ""]
    if (comparison := evaluation.comparison) is not None:
        lines += [
            f"  both right {comparison.both:,}, only A {comparison.only_first:,}, only B "
            f"{comparison.only_second:,}, both wrong {comparison.neither:,}",
            f"  McNemar's exact test: p = {comparison.p:.3g}{_verdict(comparison.p)}",
            "",
        ]
    if config.evaluation.output:
        lines.append(f"  written to {log.redact(config.evaluation.output)}")
    if finished.registered:
        lines.append(f"  registered as {finished.registered}")
    if config.evaluation.output or finished.registered:
        lines.append("")
    run, source = finished.run, config.saved.source
    if run is not None and run.tracking_uri.startswith("http"):
        lines.append(f"next: open {run.page}")
    elif run is not None:
        lines.append(f"next: make ui   then open http://localhost:5000/{run.page}")
    else:
        lines.append(f"next: python jobs/predict.py {log.redact(source)} --data PICTURES --output RESULTS")
    return "\n".join(lines)


def _verdict(p: float) -> str:
    return ": different at the 5% level" if p < 0.05 else ": not different at the 5% level"


def _results(models: Sequence[Measured]) -> list[list[str]]:
    """One row for each figure, one column for each model."""
    found = [one.metrics for one in models]
    table = [["accuracy", *(log.percent(one.correct, one.total) for one in found)]]
    if found[0].top_correct is not None:
        table.append(["top 5", *(log.percent(one.top_correct or 0, one.total) for one in found)])
    return [
        *table,
        ["loss", *(f"{one.loss:.4f}" for one in found)],
        ["macro F1", *(f"{one.macro_f1:.4f}" for one in found)],
        ["calibration error", *(f"{100 * one.calibration_error:.2f}%" for one in found)],
        ["Brier score", *(f"{one.brier:.4f}" for one in found)],
    ]


def _by_class(models: Sequence[Measured], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The classes, or of many those that are recognised worst; with two models their recalls side by side."""
    first = models[0].metrics.by_class
    chosen = sorted((one for one in first if one.total), key=lambda one: one.recall or 0.0)[:_SHOWN_CLASSES]
    kept = {one.name for one in (first if len(first) <= 2 * _SHOWN_CLASSES else chosen)}
    title = "class" if len(kept) == len(first) else f"worst {len(kept)} of {len(first)} classes"
    if len(models) == 1:
        table = [
            [
                one.name,
                _share(one.correct, one.predicted),
                _share(one.correct, one.total),
                "-" if one.f1 is None else f"{one.f1:.4f}",
            ]
            for one in first
            if one.name in kept
        ]
        return [title, "precision", "recall", "F1"], table
    second = {one.name: one for one in models[1].metrics.by_class}
    table = [
        [
            one.name,
            _share(one.correct, one.total),
            _share(second[one.name].correct, one.total),
            f"{second[one.name].correct - one.correct:+d}",
        ]
        for one in first
        if one.name in kept
    ]
    return [title, *(f"recall {name}" for name in names), "B - A"], table


def _share(part: int, whole: int) -> str:
    return log.percent(part, whole) if whole else "- (0/0)"


def _columns(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    return [
        "  " + "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in [header, *table]
    ]


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
