"""Where a job keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

from cvdist.config.train import TrainConfig


def storage_root(config: TrainConfig) -> str:
    """Folder (absolute) or URI under which every run keeps its files.

    A job submitted with `ray job submit --working-dir` runs in a copy of that folder, which Ray deletes
    afterwards; there the default is in the home folder instead.
    """
    root = config.checkpoint.storage or os.environ.get("CVDIST_STORAGE", "")
    if not root:
        in_ray_copy = "_ray_pkg_" in str(Path.cwd())
        root = str(Path.home() / "cvdist-runs") if in_ray_copy else "runs"
    if "://" in root:
        return root.rstrip("/")
    return str(Path(root).expanduser().resolve())


def cache_folder(config: TrainConfig) -> Path:
    """Folder (absolute) for what a node keeps of its data between runs."""
    named = config.data.cache or os.environ.get("CVDIST_CACHE", "")
    return Path(named or "~/.cache/cvdist").expanduser().resolve()
