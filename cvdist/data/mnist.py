"""The complete MNIST, through torchvision: 60,000 training digits, and the 10,000 test digits to validate."""

from __future__ import annotations

import socket
from pathlib import Path

from torchvision import datasets

from cvdist.data.dataset import DatasetInfo
from cvdist.data.in_memory import Labelled
from cvdist.errors import UserError

# Of the 60,000 training pictures (tests/test_data.py computes them).
MEAN, STD = 0.1307, 0.3081
_DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


def fetch(root: Path) -> None:
    """Download MNIST into `root` if it is absent.

    Raises:
        UserError: if it is absent and can't be downloaded.
    """
    if _complete(root):
        return
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        datasets.MNIST(str(root), train=True, download=True)
    except Exception as error:  # whatever a proxy, a mirror or a disk can come up with
        raise UserError(
            f"--data {root} holds no MNIST (MNIST/raw/train-images-idx3-ubyte, ...) and it could not be "
            f"downloaded: {_one_line(error)}. Put the files there, or use --dataset digits, which needs none"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def load(root: Path) -> tuple[DatasetInfo, Labelled, Labelled]:
    """All of MNIST from `root`.

    Raises:
        UserError: if files are missing or damaged.
    """
    if not _complete(root):
        raise UserError(f"--data {root} holds no MNIST: expected {root}/MNIST/raw/train-images-idx3-ubyte, ...")
    train, valid = _part(root, train=True), _part(root, train=False)
    info = DatasetInfo(
        name="mnist",
        source=f"MNIST in {root}",
        classes=tuple("0123456789"),
        channels=1,
        height=28,
        width=28,
        mean=(MEAN,),
        std=(STD,),
        train_size=len(train.labels),
        valid_size=len(valid.labels),
    )
    return info, train, valid


def _complete(root: Path) -> bool:
    raw = root / "MNIST" / "raw"
    kinds = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    return all((raw / f"{kind}-ubyte").is_file() for kind in kinds)


def _part(root: Path, *, train: bool) -> Labelled:
    count = 60_000 if train else 10_000
    prefix = "train" if train else "t10k"
    try:
        part = datasets.MNIST(str(root), train=train, download=False)
        images, labels = part.data[:, None], part.targets.long()
        if images.shape != (count, 1, 28, 28) or labels.shape != (count,):
            raise ValueError(f"{tuple(images.shape)} pictures for {len(labels)} labels")
    except Exception as error:  # torchvision's parser raises whatever the damaged bytes lead it to
        raise UserError(
            f"{root}/MNIST/raw/{prefix}-* is truncated or damaged ({_one_line(error)}): "
            "delete the folder MNIST, it is downloaded again"
        ) from error
    return Labelled(images, labels)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
