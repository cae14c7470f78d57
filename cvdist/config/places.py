"""The folders in which jobs keep their files."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

from cvdist.errors import UserError
from cvdist.log import redact


def storage_root(storage: str) -> str:
    """Return the folder (absolute) or URI below which every run keeps its files.

    `storage` is the value of `RunConfig.storage`. A job submitted with `ray job submit --working-dir` runs in a
    copy of that folder, which Ray deletes afterwards; there the default is in the home folder instead.
    """
    root = storage or os.environ.get("CVDIST_STORAGE", "")
    if not root:
        in_ray_copy = "_ray_pkg_" in str(Path.cwd())
        root = str(Path.home() / "cvdist-runs") if in_ray_copy else "runs"
    if "://" in root:
        return root.rstrip("/")
    return str(Path(root).expanduser().resolve())


def folder_for(data: str, kind: str, storage: str) -> str:
    """Return the default folder or URI for what a job makes from the pictures at `data`.

    Args:
        data: Folder or URI of the pictures.
        kind: What is made, such as `features`.
        storage: The value of `RunConfig.storage`.
    """
    uri = data.rstrip("/")
    mark = hashlib.sha256(uri.encode()).hexdigest()[:8]  # tells two folders with one name apart
    return f"{storage_root(storage)}/{kind}/{PurePosixPath(uri).name}-{mark}"


def cache_folder(cache: str) -> Path:
    """Return the folder (absolute) for a node's data between runs; `cache` is `DataConfig.cache`."""
    named = cache or os.environ.get("CVDIST_CACHE", "")
    return Path(named or "~/.cache/cvdist").expanduser().resolve()


def require_outside(data: str, **places: str) -> None:
    """Refuse to write among the pictures, where results would be taken for classes or pictures.

    Args:
        data: Folder or URI of the pictures, or empty.
        **places: Folder or URI of what is written, or empty, by the name of its flag.

    Raises:
        UserError: If one of them is the pictures' folder or lies in it.
    """
    for flag, place in places.items():
        if data and place and f"{_whole(place)}/".startswith(f"{_whole(data)}/"):
            raise UserError(
                f"--{flag} {redact(place)} is among the pictures of --data {redact(data)}, and what is written "
                "there would be taken for a part of them: name a folder outside"
            )


def _whole(uri: str) -> str:
    """Return `uri` in a form to compare: absolute, without credentials, options or a slash at the end."""
    local = uri.removeprefix("file://")
    if "://" not in local:
        return str(Path(local).expanduser().resolve()).rstrip("/")
    return re.sub(r"://[^/@]*@|\?\w+=.*$", lambda found: "://" if "@" in found[0] else "", uri).rstrip("/")
