"""Memory of a worker that reads an epoch of pictures: four times as many must not need more.

Each size is read in a separate process, once from the decoded copy on the disk and once by decoding in each
epoch. The measurement is the peak memory of the process and its decoders, with shared memory counted once
(PSS).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Comparison, summarize
from benchmarks.photographs import write_folder

SMALL, LARGE, SIZE = 2_000, 8_000, 64

_COMMON = """
import sys, psutil, torch
from cvdist import config as configs, loaders
from cvdist.config import TrainConfig
from cvdist.data.sampler import EpochOrder
folder, cache, share, size = sys.argv[1:]
settings = {"data": folder, "cache": cache, "cache_fraction": float(share), "image_size": int(size)}
config = configs.replace(TrainConfig(), dataset="images", **settings)
"""
_PREPARE = _COMMON + "loaders.prepare(config)"
_WORKER = (
    _COMMON
    + """
loader = loaders.open_loader(config, torch.device("cpu"))
process, highest = psutil.Process(), 0
for epoch in (1, 2):
    order = EpochOrder(loader.info.train_size, 64, seed=0, epoch=epoch)
    for number, batch in enumerate(loader.train_batches(order, 0, 1)):
        if number % 10 == 0:
            everyone = [process, *process.children(recursive=True)]
            highest = max(highest, sum(p.memory_full_info().pss for p in everyone))
print(highest / 2**20)
"""
)


def measure() -> Iterator[Comparison]:
    """Compare the MiB for four times the pictures with the MiB for the pictures."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = {
            count: write_folder(root / f"{count}", count, width=80, height=60) for count in (SMALL, LARGE)
        }
        for share, name in (("0.8", "kept on the disk"), ("0", "decoded again")):
            used: dict[int, list[float]] = {SMALL: [], LARGE: []}
            for count, folder in folders.items():
                arguments = [str(folder), str(root / f"cache-{share}"), share, str(SIZE)]
                _python(_PREPARE, arguments)
                used[count] = [float(json.loads(_python(_WORKER, arguments))) for _ in range(3)]
            pairs = list(zip(used[LARGE], used[SMALL], strict=True))
            yield summarize(
                f"memory, {name}: {LARGE:,} / {SMALL:,} pictures", pairs, unit="MiB", target=1.05, at_most=True
            )


def _python(script: str, arguments: list[str]) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout
