"""The complete MNIST through torchvision: 60,000 training digits; the 10,000 test digits are for validation."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from cvdist.data.dataset import DatasetInfo
from cvdist.data.in_memory import LabeledImages
from cvdist.errors import UserError

# Of the 60,000 training pictures (tests/unit/data/test_data.py computes them).
MEAN, STD = 0.1307, 0.3081
_DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte
# Bytes of each file: a header of 16 (pictures) or 8 (labels), then one byte a pixel or label.
_FILES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 784,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


def fetch(root: Path) -> None:
    """Download MNIST into `root` if it is absent.

    Raises:
        UserError: if it is absent and can't be downloaded, or a file is cut short.
    """
    if _present(root):
        return
    from torchvision import datasets  # takes long

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        datasets.MNIST(str(root), train=True, download=True)
    except Exception as error:  # whatever a proxy, a mirror or a disk can come up with
        raise UserError(
            f"--data {root} holds no MNIST (MNIST/raw/train-images-idx3-ubyte, ...) and it could not be "
            f"downloaded ({_network_reason(error)}): put the files there, or use --dataset digits, which "
            "needs no network"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def load(root: Path) -> tuple[DatasetInfo, LabeledImages, LabeledImages]:
    """Load MNIST from `root`.

    Returns:
        The description, the training pictures and the validation pictures (1x28x28).

    Raises:
        UserError: if files are missing or damaged.
    """
    if not _present(root):
        raise UserError(f"--data {root} holds no MNIST: expected {root}/MNIST/raw/train-images-idx3-ubyte, ...")
    train, valid = _part(root, train=True), _part(root, train=False)
    return describe("mnist", f"MNIST in {root}", MEAN, STD, train, valid), train, valid


def describe(
    name: str, source: str, mean: float, std: float, train: LabeledImages, valid: LabeledImages
) -> DatasetInfo:
    """Describe a data set of MNIST's digits, by the fields of `DatasetInfo`."""
    return DatasetInfo(
        name=name,
        source=source,
        classes=tuple("0123456789"),
        channels=1,
        height=28,
        width=28,
        mean=(mean,),
        std=(std,),
        train_size=len(train.labels),
        valid_size=len(valid.labels),
    )


def _present(root: Path) -> bool:
    """Return whether all files of MNIST are there."""
    for name, size in _FILES.items():
        path = root / "MNIST" / "raw" / name
        if not path.is_file():
            return False
        if path.stat().st_size != size:
            raise UserError(
                f"{path} is truncated or damaged: {path.stat().st_size:,} bytes instead of {size:,}; "
                "delete it, and the data set is downloaded again"
            )
    return True


def _part(root: Path, *, train: bool) -> LabeledImages:
    prefix = "train" if train else "t10k"
    from torchvision import datasets  # takes long

    try:
        part = datasets.MNIST(str(root), train=train, download=False)
        return LabeledImages(part.data[:, None], part.targets.long())
    except Exception as error:  # torchvision's parser raises whatever the damaged bytes lead it to
        raise UserError(
            f"{root}/MNIST/raw/{prefix}-* is damaged ({_one_line(error)}): "
            "delete the folder MNIST, and it is downloaded again"
        ) from error


def _network_reason(error: Exception) -> str:
    """Extract the operating system's reason from torchvision's long message about all mirrors it tried."""
    found = re.search(r"\[Errno -?\d+\] ([^>]+)>", str(error))
    return found[1] if found else _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
