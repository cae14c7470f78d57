"""Finds a checkpoint, or the best one of a run's folder, and reads its model's tensors."""

from __future__ import annotations

from collections.abc import Mapping

from pyarrow import fs as arrow
from torch import Tensor

from cvdist import storage
from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints.format import META, Checkpoint
from cvdist.checkpoints.store import CheckpointStore
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder


def find(uri: str) -> str:
    """Return the URI of the checkpoint at `uri`: `uri` itself, or the best checkpoint of a run's folder.

    Raises:
        UserError: If there is none.
    """
    folder = Folder.open(uri, "MODEL")
    if folder.size(META) is not None:
        return uri
    names = _subfolders(folder)
    # Only then all files below it are listed: what is no run's folder may hold very many.
    best = CheckpointStore(folder).best() if _holds_checkpoint(folder, names) else None
    if best is None:
        runs = [
            name
            for name in names
            if _holds_checkpoint(folder, [f"{name}/{n}" for n in _subfolders(folder, name)])
        ]
        hint = f"it holds the runs {', '.join(runs[:5])}: name one" if runs else "name a checkpoint or a run"
        raise UserError(f"{redact(uri)} is no checkpoint and holds none ({META}): {hint}")
    return f"{uri.rstrip('/')}/{best.name}"


def read(uri: str) -> tuple[Checkpoint, Mapping[str, Tensor]]:
    """Read a checkpoint, and return it with its model's tensors: the moving average's if there is one.

    Raises:
        UserError: If it is incomplete, damaged or of an unknown format.
    """
    with storage.local_copy(uri) as folder:
        saved = ckpt.load(folder, name=redact(uri))
    return saved, ckpt.trained_tensors(saved)


def _subfolders(folder: Folder, name: str = "") -> list[str]:
    selector = arrow.FileSelector(f"{folder.root}/{name}".rstrip("/"), allow_not_found=True)
    try:
        found = folder.filesystem.get_file_info(selector)
    except OSError as error:
        raise UserError(f"{redact(folder.uri)} can't be read ({storage.reason(error)})") from error
    folders = [info for info in found if info.type == arrow.FileType.Directory]
    return sorted(info.base_name for info in folders if not info.base_name.startswith("."))


def _holds_checkpoint(folder: Folder, names: list[str]) -> bool:
    return any(folder.size(f"{name}/{META}") is not None for name in names)
