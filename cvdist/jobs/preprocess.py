"""Extract features in this process or by Ray Data, with actors on all GPUs or CPUs, one shard per task."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial

from cvdist import config as configs
from cvdist import log, models, recipes, storage
from cvdist.config import (
    BackboneConfig,
    ExtractionConfig,
    InspectConfig,
    PicturesConfig,
    PreprocessConfig,
    ProbeConfig,
    TableConfig,
)
from cvdist.features import build, maintenance
from cvdist.features.build import BuiltCache
from cvdist.features.extract import Extractor
from cvdist.jobs import cli, console
from cvdist.runtime.environment import require_ray
from cvdist.runtime.map_workers import open_workers
from cvdist.runtime.signals import sigterm_raises

FEATURES_RECIPE = "transfer-features"
"""What trains from the caches that other jobs than this one make."""
# Fields of the data settings that features do not depend on.
OF_THE_NODE = (
    *(field.name for field in dataclasses.fields(TableConfig)),
    "uri",
    "decode_workers",
    "max_bad_fraction",
)


@dataclass(frozen=True)
class PreprocessResult:
    """A finished extraction: its settings, the cache, and seconds from start to end."""

    config: PreprocessConfig
    built: BuiltCache
    seconds: float


def preprocess(config: PreprocessConfig) -> PreprocessResult:
    """Make or update the feature cache at `--features`.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM; what is finished is kept.
    """
    began = time.monotonic()
    configs.check_preprocess(config)
    config = configs.replace(
        models.with_preprocessing(config),
        data=storage.absolute_if_there(config.data.uri),
        data_root=storage.absolute(config.data.root),
        weights=storage.absolute_if_there(config.model.weights),
        features=storage.absolute(config.features.uri),
    )
    if config.runtime.launcher == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises():
        plan = build.make_plan(config)
        compute = open_workers(
            plan.shards,
            partial(Extractor, config, plan.fingerprint),
            config.runtime,
            device=config.runtime.device,
            actors=config.features.extractors,
            flag="--extractors",
            decode_workers=config.data.decode_workers,
            verb="extracting",
        )
        built = build.build(config, plan, compute)
    return PreprocessResult(config, built, time.monotonic() - began)


def extraction_of(config: ProbeConfig | InspectConfig, model: BackboneConfig, uri: str) -> PreprocessConfig:
    """Build the settings with which another job has a network's features stored at `uri`."""
    return PreprocessConfig(
        recipe=FEATURES_RECIPE,
        data=configs.part_of(PicturesConfig, config.data),
        features=dataclasses.replace(configs.part_of(ExtractionConfig, config.features), uri=uri),
        model=model,
        compute=config.compute,
        runtime=config.runtime,
    )


def look_at_cache(how: str, uri: str) -> str:
    """Check, describe or prune the feature cache at `uri`, and say what was found.

    Args:
        how: `check` reads all of it, `describe` says what it holds, `prune` deletes what it does not refer to.
        uri: folder or URI of the cache.

    Raises:
        UserError: if it is damaged, or can't be read.
    """
    if how == "check":
        return str(maintenance.check(uri))
    if how == "describe":
        return str(maintenance.describe(uri))
    pruned = maintenance.prune(uri)
    return f"deleted {pruned.files} files, {pruned.bytes / 1e6:,.1f} MB"


def table(result: PreprocessResult) -> str:
    """Format what was extracted, and the command that trains from it."""
    cache, built, config = result.built.manifest, result.built, result.config
    uri = log.redact(config.features.uri)
    rate = f", {built.computed / built.seconds:,.1f} images/s" if built.computed else ""
    good = cache.index.rows - len(cache.bad)
    rows = [
        ("features", uri),
        ("pictures", f"{good:,} of {cache.index.rows:,}, {len(cache.bad)} can't be decoded"),
        ("computed", f"{built.computed:,} pictures in {log.duration(built.seconds)}{rate}"),
        ("stored", f"{cache.stored_bytes / 1e6:,.1f} MB in {len(cache.shards)} shards, "
                   f"{cache.stored_bytes / 1e3 / max(good, 1):,.2f} kB a picture"),
        ("time", f"{log.duration(result.seconds)} in all"),
    ]  # fmt: skip
    following = f"{cli.command('train')} {config.recipe} --features {uri}{_flags(config)}"
    return "\n".join([*console.aligned(rows), f"next: {following}"])


def _flags(config: PreprocessConfig) -> str:
    """Return the flags of a training from the features, for the settings that differ from the recipe's."""
    recipe = recipes.find(config.recipe)
    usual = PreprocessConfig.of(recipe)
    # Where the recipe leaves size and resizing to the weights, take those of this model's weights.
    prepared = models.with_preprocessing(dataclasses.replace(usual, model=config.model))
    flags = "" if recipe.data.dataset == "images" else " --dataset images"
    flags += cli.flags(config.data, prepared.data, leave_out=OF_THE_NODE)
    flags += cli.flags(config.augmentation, usual.augmentation)
    return flags + cli.flags(config.model, usual.model)
