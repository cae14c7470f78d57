"""Extraction by Ray Data: actors on all GPUs or CPUs of the cluster, one shard a task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cvdist import config as configs
from cvdist import log
from cvdist.config import TrainConfig
from cvdist.errors import UserError
from cvdist.features import build, receipt
from cvdist.features.build import Built
from cvdist.features.extract import Extractor
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.plan import WorkUnit
from cvdist.features.receipt import Receipt
from cvdist.runtime import actor_pool, ray_cluster

logger = logging.getLogger(__name__)


def extract(config: TrainConfig) -> Built:
    """Make or update the cache at `--features` on the Ray cluster.

    Raises:
        UserError: for all that the user can mend, as early as it can be found.
    """
    # One actor is enough to begin with: Ray's autoscaler may bring more.
    needed = configs.replace(config, workers=config.features.extractors or 1)
    with ThreadPoolExecutor(1) as threads:
        planning = threads.submit(build.make_plan, config)
        ray_cluster.connect(needed, "--extractors")
        plan = planning.result()
    pool = actor_pool.plan(needed, config.features.extractors, "--extractors")
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
    """An extractor in a process of Ray's. What the user can mend comes back as a row: no retry would help."""

    def __init__(
        self, config: dict[str, Any], fingerprint: dict[str, Any], use_gpu: bool, decode_threads: int
    ) -> None:
        log.setup()
        chosen = configs.from_dict(config)
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
