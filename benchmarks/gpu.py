"""A GPU used to its limits: an epoch over cached features, and extraction. Skipped where there is no GPU.

The epoch trains VGG16's classifier, 119.6 million weights, on the features of 23,000 made-up pictures in GPU
memory, by the loop's own steps. Its floor is the traffic that these steps can't do without: a weight is read in
the forward pass, its gradient written; then weight, gradient and momentum are read, and weight and momentum
written. That is 7 times 4 bytes, at the bandwidth of a copy on this GPU. Extraction reads and decodes JPEGs,
computes, compresses and stores; the bare backbone computes on one batch that lies ready, and is itself compared
with the GPU's rate of matrix products. Needs neither Ray nor MLflow.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import made_up_features
from benchmarks.harness import Comparison, summarise
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import models, recipes
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import ModelConfig, PrecisionName, TrainConfig
from cvdist.data.images.ahead import BATCH
from cvdist.distributed.precision import choose_precision
from cvdist.distributed.ranks import RankInfo
from cvdist.errors import UserError
from cvdist.features import build
from cvdist.features.extract import Extractor
from cvdist.models.registry import BLOCKS
from cvdist.tracking import NoTracker
from cvdist.training.run import Run
from cvdist.training.setup import open_run
from cvdist.training.train import train_epoch

_BYTES_A_WEIGHT = 7 * 4  # see above
_SECONDS = 0.5  # that an epoch may take on an H100
_AT_A_TIME = 2  # slices, as a GPU's actor works on them


@dataclass(frozen=True)
class Sizes:
    """What is measured; tests run all of it with small ones."""

    model: str = "vgg16"
    hidden_size: int = 0
    image_size: int = 224
    shape: tuple[int, ...] = (512, 7, 7)
    cached: int = 23_000
    batch: int = 64
    photographs: int = 4_096
    copied_bytes: int = 1 << 30
    matrix: int = 8_192
    repeats: int = 20
    rounds: int = 5


def measure() -> Iterator[Comparison]:
    """Seconds of an epoch, pictures a second, and both as shares of what the GPU can do."""
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        print(f"  skipped: {why}", flush=True)
        return
    device = torch.device("cuda", 0)
    print(f"  on {torch.cuda.get_device_name(device)}", flush=True)
    yield from all_on(device, Sizes())


def all_on(device: torch.device, sizes: Sizes) -> Iterator[Comparison]:
    """All comparisons on a device."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _write_weights(sizes, root / "weights.pth")
        yield from _epochs(device, sizes, root)
        yield from _extraction(device, sizes, root)


def _write_weights(sizes: Sizes, path: Path) -> None:
    """Random convolutions."""
    settings = ModelConfig(name=sizes.model, head="linear", trainable_blocks=BLOCKS)
    state = models.build_model(settings, models.InputSpec(3, 224, 224), 2).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("features.")}, path)


# ------------------------------------------------------------------------------------------------ the epoch


def _epochs(device: torch.device, sizes: Sizes, root: Path) -> Iterator[Comparison]:
    made_up_features.write(root / "features", sizes.cached, 4, shape=sizes.shape)
    bandwidth = _bandwidth(device, sizes)
    print(f"  a copy in memory: {bandwidth / 1e9:,.0f} GB/s", flush=True)
    kinds: tuple[PrecisionName, ...] = ("tf32", "bfloat16")
    for kind in kinds:
        run = _run(_config(sizes, root, kind), device, root)
        seconds = [_epoch(run, device) for _ in range(sizes.rounds + 1)][1:]
        weights = sum(p.numel() for p in run.trained.parameters())
        steps = -(-sizes.cached // sizes.batch)
        floor = weights * _BYTES_A_WEIGHT * steps / bandwidth
        yield summarise(
            f"epoch of {sizes.cached:,} cached pictures, {kind} / {_SECONDS} s",
            [(one, _SECONDS) for one in seconds], unit="seconds", target=1, at_most=True,
        )  # fmt: skip
        yield summarise(
            f"the same, {kind} / its memory traffic's floor",
            [(one, floor) for one in seconds], unit="seconds", target=2, at_most=True,
        )  # fmt: skip
        del run


def _config(sizes: Sizes, root: Path, kind: PrecisionName) -> TrainConfig:
    return configs.replace(
        recipes.find("dogs-cats-vgg16-features"),
        model=sizes.model, hidden_size=sizes.hidden_size, image_size=sizes.image_size, data="",
        features=str(root / "features"), cache=str(root / "cache"), batch_size=sizes.batch, precision=kind,
        weights=str(root / "weights.pth"), weights_preprocessing="imagenet", name="bench", tracking="none",
        log_every_steps=50,
    )  # fmt: skip


def _run(config: TrainConfig, device: torch.device, root: Path) -> Run:
    worker = Worker(RankInfo(device=device), CheckpointStore.at(str(root / "none")))
    # Not `build_run`, which would refuse features that are made up.
    return open_run(config, worker, NoTracker())


def _epoch(run: Run, device: torch.device) -> float:
    run.progress.position = 0
    return _timed(lambda: train_epoch(run, 1), device)


def _bandwidth(device: torch.device, sizes: Sizes) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.ones(sizes.copied_bytes // 4, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(sizes.repeats):
            target.copy_(source)

    best = min(_timed(run, device) for _ in range(3))
    return 2 * sizes.copied_bytes * sizes.repeats / best


# ------------------------------------------------------------------------------------------------ extraction


def _extraction(device: torch.device, sizes: Sizes, root: Path) -> Iterator[Comparison]:
    write_folder(root / "pictures", sizes.photographs)
    config = configs.replace(_config(sizes, root, "bfloat16"), data=str(root / "pictures"))
    decoders = ("cpu", "nvjpeg") if device.type == "cuda" else ("cpu",)
    for decoder in decoders:
        chosen = configs.replace(config, decoder=decoder)
        try:
            rounds = [(_extracted(chosen, device, root), _bare(config, device)) for _ in range(3)][1:]
        except UserError as error:
            print(f"  left out: {error}", flush=True)
            continue
        yield summarise(
            f"extraction, --decoder {decoder} / the bare backbone", rounds, unit="pictures/s", target=0.9
        )
    bare = [_bare(config, device) for _ in range(3)]
    operations, rate = _operations(config), _matrix_rate(device, sizes)
    yield summarise(
        "the bare backbone / the rate of matrix products, bfloat16",
        [(one * operations / 1e12, rate / 1e12) for one in bare], unit="TFLOP/s", target=0,
    )  # fmt: skip


def _extracted(config: TrainConfig, device: torch.device, root: Path) -> float:
    extraction = configs.replace(configs.PreprocessConfig.of(config), features=str(root / "extracted"))
    shutil.rmtree(root / "extracted", ignore_errors=True)
    plan = build.make_plan(extraction)
    extractor = Extractor(extraction, plan.fingerprint, device)
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        built = build.build(extraction, plan, lambda left: threads.map(extractor, left))
    return built.computed / built.seconds


@torch.inference_mode()
def _bare(config: TrainConfig, device: torch.device) -> float:
    """Pictures a second."""
    frozen = models.build_frozen(config.model).module.to(device).to(memory_format=torch.channels_last)
    precision = choose_precision(config.loop.precision, device)
    size, count = config.data.image_size, BATCH[device.type]
    images = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    repeats = 20 if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(repeats):
            with precision.autocast():
                frozen(images)

    run()
    return count * repeats / _timed(run, device)


def _operations(config: TrainConfig) -> int:
    """Floating point operations of the backbone on one picture."""
    size = config.data.image_size
    with FlopCounterMode(display=False) as counter:
        models.build_frozen(config.model).module.to("meta")(torch.zeros(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def _matrix_rate(device: torch.device, sizes: Sizes) -> float:
    """Floating point operations a second of square matrices' products."""
    one = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(sizes.repeats):
            one @ one

    run()
    best = min(_timed(run, device) for _ in range(3))
    return 2 * sizes.matrix**3 * sizes.repeats / best


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done all of it."""
    _finish(device)
    started = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tiny() -> Sizes:
    """What a processor does in seconds."""
    return dataclasses.replace(
        Sizes(), model="vgg11", hidden_size=8, image_size=32, shape=(512, 1, 1), cached=200, photographs=12,
        copied_bytes=1 << 20, matrix=64, repeats=2, rounds=2,
    )  # fmt: skip
