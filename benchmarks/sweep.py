"""A sweep of 20 trials from a cache against 20 trainings of the same epochs from the pictures.

All trainings are of VGG16 with frozen convolutions, 1,600 training and 400 validation pictures, three epochs,
on all cores. They are compared by core-seconds: user and system time of all processes. The sweep is
`jobs/sweep.py` as users run it, from start to end, with all of Ray's processes, the default search over heads
and their settings and ASHA, but without the final training of the best. Its features are synthetic, of VGG16's
size. The second comparison excludes what early stopping saves: it counts trainings from the pictures for only
as many epochs as the sweep's trials had.

The other side trains from decoded pictures in the page cache, with this project's own loop, which uses bfloat16
and channels_last if the processor supports them and is several times as fast as the book's code. It is timed on
a few batches of training and validation and scaled to all epochs, since 20 trainings would take hours. Its
start, listing and decoding are not counted, which favors it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import torchvision

from benchmarks import made_up_features
from benchmarks.harness import Comparison, summarize
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import recipes
from cvdist.features import fingerprint, manifest
from cvdist.storage import Folder
from cvdist.tracking import NoTracker
from cvdist.training.run import Run
from cvdist.training.train import train_epoch
from cvdist.training.validation import validate
from tests.helpers.runs import build

TRIALS, EPOCHS, TRAIN, VALID, BATCH = 20, 3, 1600, 400, 64
TIMED_BATCHES, ROUNDS = 2, 2
# Between two looks at the processes: what one of them does after the last is not seen.
_LOOK_SECONDS = 0.5
_ROOT = Path(__file__).resolve().parent.parent


def measure() -> Iterator[Comparison]:
    """Measure core-seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        weights = _weights(root)
        _features(root, weights)
        run = _from_pictures(root, weights)
        rounds = [_epoch_from_pictures(run) for _ in range(ROUNDS + 1)][1:]
        del run
        print(f"  an epoch from the pictures: {', '.join(f'{seconds:.0f}' for seconds in rounds)} core-s")
        seconds, epochs = _sweep(root, weights)
    print(f"  the sweep: {seconds:.0f} core-s, {epochs} of {TRIALS * EPOCHS} epochs trained")
    yield summarize(
        "20 trainings from the pictures / a sweep of 20 trials",
        [(TRIALS * EPOCHS * epoch, seconds) for epoch in rounds], unit="core-s", target=15,
    )  # fmt: skip
    yield summarize(
        "the same, of as many epochs as the sweep trained",
        [(epochs * epoch, seconds) for epoch in rounds], unit="core-s", target=7,
    )  # fmt: skip


def _weights(root: Path) -> Path:
    path = root / "weights.pth"
    vgg = torchvision.models.vgg16()
    torch.save({f"features.{n}": t for n, t in vgg.features.state_dict().items()}, path)
    return path


def _features(root: Path, weights: Path) -> None:
    """Write a synthetic cache with the fingerprint that training asks for."""
    made = made_up_features.write(root / "features", TRAIN, VALID)
    config = configs.replace(
        recipes.find("dogs-cats-vgg16-features"), weights=str(weights), weights_preprocessing="imagenet"
    )
    made = dataclasses.replace(made, fingerprint=fingerprint.for_training(config.data, config.model))
    Folder.open(str(root / "features"), "--features").write(manifest.NAME, manifest.dump(made))


def _sweep(root: Path, weights: Path) -> tuple[float, int]:
    """Run the sweep, and return its core-seconds and the number of epochs that its trials trained."""
    run = ["jobs/sweep.py", "dogs-cats-vgg16-features", "--features", root / "features", "--weights", weights]
    run += ["--weights-preprocessing", "imagenet", "--epochs", EPOCHS, "--trials", TRIALS, "--num-workers", 1]
    run += ["--cache", root / "cache", "--storage", root / "runs", "--no-train-best"]
    ours = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    with (root / "out").open("w+") as output:
        job = psutil.Popen(
            [sys.executable, *map(str, run)], cwd=_ROOT, env=environment, stdout=output, stderr=output
        )
        seconds: dict[tuple[int, float], float] = {}
        while job.poll() is None:
            for process in [job, *job.children(recursive=True)]:  # Ray's are among them
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    seconds[process.pid, process.create_time()] = times.user + times.system
            time.sleep(_LOOK_SECONDS)
        output.seek(0)
        text = output.read()
    found = re.search(r"(\d+) of \d+ epochs trained", text)
    if job.returncode or not found:
        raise RuntimeError(text[-3000:])
    return sum(seconds.values()), int(found[1])


def _from_pictures(root: Path, weights: Path) -> Run:
    """Build a training loop on a few pictures."""
    folder = write_folder(root / "pictures", TIMED_BATCHES * BATCH)
    for i in range(BATCH):
        name = f"{('cat', 'dog')[i % 2]}/{i:06}.jpg"
        shutil.copyfile(folder / "train" / name, folder / "valid" / name)
    config = configs.replace(
        recipes.find("dogs-cats-vgg16-dropout"),
        data=str(root / "pictures"), cache=str(root / "cache"), batch_size=BATCH, tracking="none",
        weights=str(weights), weights_preprocessing="imagenet", name="none", storage=str(root),
    )  # fmt: skip
    return build(config, NoTracker())


def _epoch_from_pictures(run: Run) -> float:
    """Return the core-seconds of an epoch over all pictures, scaled from one over a few of them."""
    started = time.process_time()
    run.progress.position = 0
    train_epoch(run, 1)
    trained = time.process_time()
    validate(run)
    validated = time.process_time()
    return (trained - started) * TRAIN / run.info.train_size + (
        validated - trained
    ) * VALID / run.info.valid_size
