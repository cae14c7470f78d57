"""Inspection of labeled pictures by their features: copies, leaks, wrong labels and odd pictures."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from functools import partial

import torch

from cvdist import config as configs
from cvdist import log, models, recipes, storage, tracking
from cvdist.config import (
    BackboneConfig,
    DataConfig,
    FeaturesConfig,
    InspectConfig,
    RuntimeConfig,
    TrainConfig,
)
from cvdist.data.contents import Contents
from cvdist.data.forms import root_of
from cvdist.data.images.exclusion import read_paths
from cvdist.data.images.listing import require_one_class
from cvdist.distributed import device as devices
from cvdist.errors import UserError
from cvdist.features import build, manifest
from cvdist.features import open as features
from cvdist.features.manifest import Manifest
from cvdist.inspection import issues, page
from cvdist.inspection.alignment import SIDE as COMPARED_SIDE
from cvdist.inspection.findings import Findings, find
from cvdist.inspection.issues import COPY, KINDS, LABEL, LEAK
from cvdist.inspection.pictures import InspectedPictures, Originals, name_of, read
from cvdist.jobs import console
from cvdist.jobs.preprocess import FEATURES_RECIPE, extraction_of, preprocess
from cvdist.report_html.inspection import SIDE as SHOWN_SIDE
from cvdist.report_html.inspection import render
from cvdist.runtime.environment import require_ray
from cvdist.runtime.signals import sigterm_raises
from cvdist.storage import Folder
from cvdist.tracking import RunRef, TrackingStore, environment, open_tracker

logger = logging.getLogger(__name__)

CSV, PARQUET, PAGE = "issues.csv", "issues.parquet", "inspection.html"


@dataclass(frozen=True)
class InspectResult:
    """A finished inspection.

    Attributes:
        config: Its settings.
        cache: The manifest of the feature cache.
        pictures: The pictures.
        findings: What was found.
        run: The MLflow run that holds the results; None without one.
        seconds: From start to end.
    """

    config: InspectConfig
    cache: Manifest
    pictures: InspectedPictures
    findings: Findings
    run: RunRef | None
    seconds: float


def inspect(config: InspectConfig) -> InspectResult:
    """Make or find the feature cache, look for what is wrong with the pictures, and write and log the results.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM; what is finished of a cache is kept.
    """
    began = time.monotonic()
    config = configs.replace(
        config,
        data=storage.absolute(config.data.uri),
        data_root=storage.absolute(config.data.root),
        exclude=storage.absolute(config.data.exclude),
        features=storage.absolute(config.features.uri),
        weights=storage.absolute_if_there(config.model.weights),
        output=storage.absolute(config.inspection.output),
    )
    configs.check_inspect(config)
    if config.runtime.launcher == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises():
        storage.check_writable(config.output, "--output")
        if config.data.exclude:
            read_paths(config.data.exclude)
        require_one_class(config.data, "inspect.py")
        logged_to = config.lookup.tracking(config.inspection.tracking)
        store = tracking.open_tracking_store(logged_to, config.lookup.storage)
        cache = _cache(config)
        pictures, findings, files = _find(config)
        folder = Folder.open(config.output, "--output")
        for name, content in files.items():
            folder.write(name, content)
        result = InspectResult(config, cache, pictures, findings, None, time.monotonic() - began)
        if store is not None:
            result = dataclasses.replace(result, run=_log(store, result, files))
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def _cache(config: InspectConfig) -> Manifest:
    """Return the manifest of the cache in `--features`, checked against the pictures, or of a new cache."""
    folder = Folder.open(config.cache, "--features")
    if config.features.uri and folder.find(manifest.NAME) is not None:
        cache = manifest.read(folder)
        features.require_same_pictures(_training(config), folder, cache)
        return cache
    asked = configs.part_of(BackboneConfig, config.model)
    logger.info("network    %s: weights %s", asked.name, log.redact(asked.weights))
    extraction = extraction_of(config, models.prepare_with_cut(asked), config.cache)
    return preprocess(extraction).built.manifest


def _training(config: InspectConfig) -> TrainConfig:
    """Build the settings that the cache is opened with."""
    usual = recipes.find(FEATURES_RECIPE)
    return dataclasses.replace(
        usual,
        data=configs.part_of(DataConfig, config.data),
        features=FeaturesConfig(uri=config.cache, views=1),
        runtime=dataclasses.replace(RuntimeConfig(), data_timeout=config.runtime.data_timeout),
    )


def _root(config: InspectConfig, cache: Manifest, path: str) -> str:
    """Return the root of a cache's paths: that of `--data`, or the cache's own if `--data` lacks `path`."""
    root = root_of(config.data)
    try:
        Contents(root).read(path)
    except UserError:
        return cache.root
    return root


def _find(config: InspectConfig) -> tuple[InspectedPictures, Findings, dict[str, bytes]]:
    """Look at the pictures. Returns them, the findings, and the files with the findings by name."""
    line = log.ProgressLine(logger, enabled=True)

    def progress(doing: str) -> None:
        if line.due():
            line.show(doing)

    loader = features.load(_training(config), torch.device("cpu"), 1)
    folder = Folder.open(config.cache, "--features")
    cache = manifest.read(folder)
    index = build.read_index(folder, cache)
    with torch.no_grad():
        pictures = read(loader, index, lambda done: progress(f"{done:,} pictures' features read"))
        loader.copy.close()
        device = devices.here(config.runtime.device_here)
        root = _root(config, cache, pictures.paths[0])
        workers, timeout = config.data.decode_workers, config.runtime.data_timeout
        small, shown = (
            Originals(root, pictures, side, workers=workers, timeout=timeout)
            for side in (COMPARED_SIDE, SHOWN_SIDE)
        )
        findings = find(pictures, small, config.inspection.first, device, progress)
        content = page.page_of(
            pictures,
            findings,
            shown,
            f"Inspection of {name_of(config.data.uri)}",
            loader.info.source,
            environment.command(),
        )
    small.close()
    shown.close()
    line.clear()
    found = issues.table(findings.issues)
    files = {
        CSV: issues.to_csv(found),
        PARQUET: issues.to_parquet(found),
        PAGE: render(content).encode(),
    }
    return pictures, findings, files


# ------------------------------------------------------------------------------------------------- MLflow


def _log(store: TrackingStore, result: InspectResult, files: dict[str, bytes]) -> RunRef:
    """Log the results as a run, end the run, and return it."""
    config = result.config
    tags = {"cvdist.kind": "inspection", **environment.run_tags()}
    run = tracking.create_run(store, f"inspection of {name_of(config.data.uri)}", tags)
    with tracking.end_run_on_exit(run):
        tracker = open_tracker(run, 0, 0, "")
        tracker.log_params(dict(configs.flat(config)))
        tracker.log_metrics(metrics(result), step=0)
        for name, content in files.items():
            tracker.log_artifact(name, partial(bytes, content))
        tracker.close()
        lines = [f"`{environment.command()}`", "", *(f"- {name}: {value}" for name, value in _rows(result))]
        tracking.set_description(run, "\n".join(lines))
    return run


def metrics(result: InspectResult) -> dict[str, float]:
    """Return the counts and rates of an inspection, by their names in MLflow."""
    found, total = result.findings, len(result.pictures)
    right, leaked = found.right, found.leaked
    rest = {"valid_accuracy_without_leaks": float(right[~leaked].mean())} if not leaked.all() else {}
    return {
        "pictures": total,
        **{f"issues/{kind}": len(found.of(kind)) for kind in KINDS},
        "wrong_labels/estimate": found.wrong_labels,
        "wrong_labels/rate": found.wrong_rate,
        "left_out_accuracy": found.left_out_correct / total,
        "valid_accuracy": float(right.mean()),
        **rest,
    }


# ----------------------------------------------------------------------------------------------- printing


def table(result: InspectResult) -> str:
    """Format what was found in a few lines, and what to do next."""
    output = log.redact(result.config.output)
    rows = [
        *_rows(result),
        ("written", f"{output}/{PAGE}, {CSV} and {PARQUET}"),
        ("time", f"{log.duration(result.seconds)} in all"),
        *console.mlflow_row(result.run),
    ]
    if not result.findings.issues:
        following = "nothing to leave out: train"
    else:
        following = (
            f"open {output}/{PAGE}, correct the column leave_out of {CSV}, and train with\n"
            f"      --exclude {output}/{CSV}"
        )
    return "\n".join([*console.aligned(rows), f"next: {following}"])


def _rows(result: InspectResult) -> list[tuple[str, str]]:
    """Return names and values that tell what was found."""
    pictures, found, cache = result.pictures, result.findings, result.cache
    valid = int(pictures.valid.sum())
    bad = f"; {len(cache.bad)} more can't be decoded" if cache.bad else ""
    leaks, wrong = found.of(LEAK), found.of(LABEL)
    odd = {kind: len(found.of(kind)) for kind in KINDS if kind not in (LEAK, COPY, LABEL)}
    listed = ", ".join(f"{count} {kind}" for kind, count in odd.items() if count)
    labels = f"{len(wrong)} doubtful; of these, about {found.wrong_labels:.1f} are wrong, by estimate"
    return [
        ("data", f"{log.redact(result.config.data.uri)}: {len(pictures) - valid:,} pictures for training, "
                 f"{valid:,} for validation{bad}"),
        ("features", f"{log.redact(result.config.cache)}, of {cache.fingerprint.model}"),
        ("copies", f"{len(leaks)} across the splits, {len(found.of(COPY))} others"),
        ("labels", labels if wrong else "none doubtful"),
        ("odd", listed or "none"),
        *(("note", line) for line in page.sentences(pictures, found)),
    ]  # fmt: skip
