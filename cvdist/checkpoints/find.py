"""Models from checkpoints: one checkpoint's folder, or a run's folder of several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyarrow import fs as arrow
from torch import Tensor

from cvdist import storage
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.format import Checkpoint
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder

_META = "checkpoint.json"


def find(uri: str) -> str:
    """The checkpoint at `uri`: itself, or the best one of a run's folder, else its newest.

    Raises:
        UserError: if there is none.
    """
    folder = Folder.open(uri, "MODEL")
    if folder.size(_META) is not None:
        return uri
    found = {name: meta for name in _subfolders(folder) if (meta := _meta(folder, name))}
    if not found:
        runs = [name for name in _subfolders(folder) if _holds_checkpoints(folder, name)]
        hint = f"it holds the runs {', '.join(runs[:5])}: name one" if runs else "name a checkpoint or a run"
        raise UserError(f"{redact(uri)} is no checkpoint and holds none ({_META}): {hint}")
    newest = max(found, key=lambda name: _progress(found[name]))
    # Every checkpoint knows the best epoch so far, and the end of an epoch has position 0.
    best = (found[newest]["progress"]["best_epoch"], 0)
    name = next((name for name in found if _progress(found[name]) == best), newest)
    return f"{uri.rstrip('/')}/{name}"


def read(uri: str) -> tuple[Checkpoint, Mapping[str, Tensor]]:
    """A checkpoint, and its model's tensors: the moving average where there is one.

    Raises:
        UserError: if it is incomplete, damaged or of an unknown format.
    """
    with storage.local_copy(uri) as folder:
        saved = ckpt.load(folder, name=redact(uri))
    return saved, ckpt.trained_tensors(saved)


def _subfolders(folder: Folder) -> list[str]:
    selector = arrow.FileSelector(folder.root, allow_not_found=True)
    try:
        found = folder.filesystem.get_file_info(selector)
    except OSError as error:
        raise UserError(f"{redact(folder.uri)} can't be read ({storage.reason(error)})") from error
    folders = [info for info in found if info.type == arrow.FileType.Directory]
    return sorted(info.base_name for info in folders if not info.base_name.startswith("."))


def _holds_checkpoints(folder: Folder, name: str) -> bool:
    inner = Folder(f"{folder.uri.rstrip('/')}/{name}", folder.filesystem, f"{folder.root}/{name}", folder.flag)
    return any(_meta(inner, checkpoint) for checkpoint in _subfolders(inner))


def _meta(folder: Folder, name: str) -> dict[str, Any] | None:
    """`checkpoint.json` below `name`, or None where that is none."""
    content = folder.find(f"{name}/{_META}")
    try:
        meta = json.loads(content) if content else None
    except ValueError:
        return None
    return meta if isinstance(meta, dict) and "progress" in meta else None


def _progress(meta: dict[str, Any]) -> tuple[int, int]:
    return int(meta["progress"]["epoch"]), int(meta["progress"]["position"])
