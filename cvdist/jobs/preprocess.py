"""Extraction of features in this process, or by Ray Data: actors on all GPUs or CPUs, one shard a task."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvdist import config as configs
from cvdist import log, recipes, storage
from cvdist.config import PreprocessConfig
from cvdist.distributed import device as devices
from cvdist.errors import UserError
from cvdist.features import build, inspect, receipt
from cvdist.features.build import BuiltCache, ExtractionPlan
from cvdist.features.extract import Extractor
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.plan import WorkUnit
from cvdist.features.receipt import Receipt
from cvdist.jobs import cli, console
from cvdist.runtime.installed import require_ray
from cvdist.runtime.signals import sigterm_raises

logger = logging.getLogger(__name__)

_OF_THE_NODE = ("uri", "decode_workers", "max_bad_fraction")  # of the data: no part of the features


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
        config,
        data=storage.absolute_if_there(config.data.uri),
        weights=storage.absolute_if_there(config.model.weights),
        features=storage.absolute(config.features.uri),
    )
    with sigterm_raises():
        built = (_here if config.runtime.launcher == "inline" else _on_ray)(config)
    return PreprocessResult(config, built, time.monotonic() - began)


def _here(config: PreprocessConfig) -> BuiltCache:
    """Extract in this process, without Ray."""
    device = devices.here(config.runtime.device)
    plan = build.make_plan(config)

    def compute(left: Sequence[WorkUnit]) -> Iterator[Receipt]:
        extractor = Extractor(config, plan.fingerprint, device, decode_threads=config.data.decode_workers)
        logger.info("extracting on %s in this process, %s", device, extractor.precision.name)
        yield from map(extractor, left)

    return build.build(config, plan, compute)


def _on_ray(config: PreprocessConfig) -> BuiltCache:
    """Extract by actors on the Ray cluster."""
    require_ray("use --runtime inline")
    from cvdist.runtime import actor_pool, ray_cluster
    from cvdist.runtime.ray_cluster import ResourceRequest

    # One actor is enough to begin with: Ray's autoscaler may bring more.
    extractors = config.features.extractors
    request = ResourceRequest(extractors or 1, config.runtime.device, config.runtime, "--extractors")
    with ThreadPoolExecutor(1) as threads:
        planning = threads.submit(build.make_plan, config)
        ray_cluster.connect(request)
        plan: ExtractionPlan = planning.result()
    pool = actor_pool.plan(request, extractors, config.data.decode_workers)
    arguments = {
        "config": configs.to_dict(config),
        "fingerprint": plan.fingerprint.to_dict(),
        "use_gpu": pool.use_gpu,
        "decode_threads": pool.decode_threads,
    }

    def compute(left: Sequence[WorkUnit]) -> Iterator[Receipt | None]:
        logger.info("extracting on %s", pool.describe(len(left)))
        for result in actor_pool.run(pool, _Actor, arguments, [work.to_dict() for work in left]):
            yield None if result is None else receipt.require(result)

    return build.build(config, plan, compute)


class _Actor:
    """An extractor in a process of Ray's. What the user can correct comes back as a row."""

    def __init__(
        self, config: dict[str, Any], fingerprint: dict[str, Any], use_gpu: bool, decode_threads: int
    ) -> None:
        log.setup()
        chosen = configs.from_dict(PreprocessConfig, config)
        # How many threads PyTorch computes with, Ray has set by the cores of this actor.
        device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
        self._extractor, self._error = None, ""
        try:
            self._extractor = Extractor(
                chosen, Fingerprint.from_dict(fingerprint), device, decode_threads=decode_threads
            )
        except UserError as error:
            self._error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        (work,) = batch["slice"]
        content, error = b"", self._error
        if self._extractor is not None:
            try:
                content = receipt.dump(self._extractor(WorkUnit.from_dict(work)))
            except UserError as caught:
                error = str(caught)
        return {"result": [content], "error": [error]}


def inspect_cache(how: str, uri: str) -> str:
    """Look at the feature cache at `uri`, and say what was found.

    Args:
        how: `check` reads all of it, `describe` says what it holds, `prune` deletes what it does not refer to.
        uri: folder or URI of the cache.

    Raises:
        UserError: if it is damaged, or can't be read.
    """
    if how == "check":
        return str(inspect.check(uri))
    if how == "describe":
        return str(inspect.describe(uri))
    pruned = inspect.prune(uri)
    return f"deleted {pruned.files} files, {pruned.bytes / 1e6:,.1f} MB"


def present(result: PreprocessResult) -> int:
    """Print what came of the extraction; returns the exit code."""
    cli.show(table(result))
    return 0


def table(result: PreprocessResult) -> str:
    """What was extracted, and the command that trains from it."""
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
    """What the features depend on and the recipe has otherwise, for a command that trains from them."""
    recipe = recipes.find(config.recipe)
    usual = PreprocessConfig.of(recipe)
    flags = "" if recipe.data.dataset == "images" else " --dataset images"
    for group in ("data", "model"):
        mine, theirs = getattr(config, group), getattr(usual, group)
        for one in configs.fields_of(type(mine)):
            value = getattr(mine, one.field)
            if one.field not in _OF_THE_NODE and value != getattr(theirs, one.field):
                flags += f" {configs.dashed(one.flag)} {log.redact(str(value))}"
    return flags
