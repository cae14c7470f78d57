"""The folders in which jobs keep their files."""

from __future__ import annotations

import os
from pathlib import Path


def storage_root(storage: str) -> str:
    """Folder (absolute) or URI under which every run keeps its files; `storage` as `RunConfig.storage`.

    A job submitted with `ray job submit --working-dir` runs in a copy of that folder, which Ray deletes
    afterwards; there the default is in the home folder instead.
    """
    root = storage or os.environ.get("CVDIST_STORAGE", "")
    if not root:
        in_ray_copy = "_ray_pkg_" in str(Path.cwd())
        root = str(Path.home() / "cvdist-runs") if in_ray_copy else "runs"
    if "://" in root:
        return root.rstrip("/")
    return str(Path(root).expanduser().resolve())


def cache_folder(cache: str) -> Path:
    """Folder (absolute) for what a node keeps of its data between runs; `cache` as `DataConfig.cache`."""
    named = cache or os.environ.get("CVDIST_CACHE", "")
    return Path(named or "~/.cache/cvdist").expanduser().resolve()
