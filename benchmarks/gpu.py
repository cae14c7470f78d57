"""A GPU used to its limits: epochs from a cache, extraction, training jobs. Skipped without a GPU.

`python benchmarks/gpu.py [--only SECTION ...] [--output FOLDER]` prints every figure as it comes, and writes
all of them to `gpu.jsonl`; a section that fails is reported, and the others go on. Pictures and weights are
those below $CVDIST_TEST_DATA (`dogs-vs-cats`, `weights/vgg16_features.pth`, `mnist`) where that is set, else
made up. Needs neither Ray nor MLflow, but tyro and simplejpeg, which images of PyTorch lack.

The epoch trains VGG16's classifier, 119.6 million weights, on the features of 23,000 pictures in GPU memory.
Its floor is the traffic that these steps can't do without: a weight is read in the forward pass, its gradient
written; then weight, gradient and momentum are read, and weight and momentum written. That is 7 times 4
bytes, at the bandwidth of a copy on this GPU. Extraction reads and decodes JPEGs, computes, compresses and
stores; the bare backbone computes on one batch that lies ready, and is itself compared with the GPU's rate of
matrix products.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.harness import Comparison, summarize  # noqa: E402
from benchmarks.photographs import write_folder  # noqa: E402
from cvdist import config as configs  # noqa: E402
from cvdist import models, recipes  # noqa: E402
from cvdist.config import ModelConfig, PreprocessConfig, TrainConfig  # noqa: E402
from cvdist.data.contents import DIGEST_BYTES  # noqa: E402
from cvdist.data.images.ahead import BATCH, DecodeAhead, Decoded  # noqa: E402
from cvdist.errors import UserError  # noqa: E402
from cvdist.features import build  # noqa: E402
from cvdist.features.extract import Extractor  # noqa: E402
from cvdist.hardware import usable_cores  # noqa: E402
from cvdist.jobs import cli  # noqa: E402
from cvdist.jobs.train import train  # noqa: E402
from cvdist.training import memory  # noqa: E402

_BYTES_A_WEIGHT = 7 * 4  # see above
_SECONDS = 0.5  # that an epoch may take on an H100


@dataclass(frozen=True)
class Sizes:
    """The sizes of what is measured. Tests run all of it with small sizes."""

    model: str = "vgg16"
    hidden_size: int = 0
    image_size: int = 224
    cached: int = 23_000
    batch: int = 64
    epochs: int = 5
    photographs: int = 4_096
    copied_bytes: int = 1 << 30
    matrix: int = 8_192
    repeats: int = 20
    bare_batch: int = 0  # 0: the batch of the product
    digits: tuple[str, ...] = ("mnist-cnn", "--epochs", "20")
    job_epochs: int = 0  # 0: as many as the recipe has


def tiny() -> Sizes:
    """Return sizes that are small enough for a CPU to finish in seconds."""
    return dataclasses.replace(
        Sizes(),
        model="vgg11",
        hidden_size=8,
        image_size=32,
        cached=40,
        batch=8,
        epochs=2,
        photographs=12,
        copied_bytes=1 << 20,
        matrix=64,
        repeats=2,
        bare_batch=2,
        digits=("digits-cnn", "--epochs", "2"),
        job_epochs=1,
    )


@dataclass
class Bench:
    """The device, sizes and data of the benchmarks, and what has been measured so far."""

    device: torch.device
    sizes: Sizes
    root: Path
    output: Path | None = None
    jobs: str = ""
    """Pattern of the jobs that are run; empty: all."""
    pictures: Path = field(init=False)
    weights: Path = field(init=False)
    preprocessing: str = field(init=False)
    data: Path | None = field(init=False)

    def __post_init__(self) -> None:
        """Use real data if there is some and the sizes are real; else make up pictures and convolutions."""
        given = os.environ.get("CVDIST_TEST_DATA", "")
        self.data = Path(given) if given and self.sizes == Sizes() else None
        if self.data is not None:
            self.pictures, self.preprocessing = self.data / "dogs-vs-cats", "vgg-features"
            self.weights = self.data / "weights" / "vgg16_features.pth"
            return
        self.pictures, self.preprocessing = self.root / "pictures", "imagenet"
        self.weights = self.root / "weights.pth"
        write_folder(self.pictures, self.sizes.photographs)
        settings = ModelConfig(name=self.sizes.model, head="linear", features_at="maps", trainable_stages=5)
        state = models.build_model(settings, models.InputSpec(3, 224, 224), 2).state_dict()
        torch.save({k: v for k, v in state.items() if k.startswith("features.")}, self.weights)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def note(self, section: str, **values: Any) -> None:
        """Print one line of measured values and keep it for the JSON file."""
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        print(f"  {section}: {shown}", flush=True)
        if self.output is not None:
            with (self.output / "gpu.jsonl").open("a") as file:
                file.write(json.dumps({"section": section, **values}) + "\n")

    def config(self, recipe: str = "dogs-cats-vgg16-features", **changes: Any) -> TrainConfig:
        """Return the settings of a job without MLflow that keeps everything it writes below `root`."""
        sizes = self.sizes
        return configs.replace(
            recipes.find(recipe),
            **{
                "model": sizes.model,
                "hidden_size": sizes.hidden_size,
                "image_size": sizes.image_size,
                "data": "",
                "cache": str(self.root / "cache"),
                "batch_size": sizes.batch,
                "weights": str(self.weights),
                "weights_preprocessing": self.preprocessing,
                "tracking": "none",
                "runtime": "inline",
                "storage": str(self.root / "runs"),
                "device": self.device.type,
                "precision": "bfloat16",
                **changes,
            },
        )

    def extraction(self, **changes: Any) -> PreprocessConfig:
        """Return the settings of an extraction for the same model."""
        features = changes.pop("features", "")
        config = PreprocessConfig.of(self.config(**changes))
        return configs.replace(config, features=features) if features else config

    def repeated(self) -> Path:
        """Return a folder with `sizes.cached` training pictures, which are repeated under new names."""
        folder = self.root / "repeated"
        if folder.exists():
            return folder
        originals = sorted((self.pictures / "train").rglob("*.jpg"))
        for number in range(self.sizes.cached):
            of = originals[number % len(originals)]
            to = folder / "train" / of.parent.name / f"{number:06}.jpg"
            to.parent.mkdir(parents=True, exist_ok=True)
            _link(of, to)
        for of in sorted((self.pictures / "valid").rglob("*.jpg")):
            to = folder / "valid" / of.parent.name / of.name
            to.parent.mkdir(parents=True, exist_ok=True)
            _link(of, to)
        return folder

    def features(self) -> Path:
        """Compute a cache of `repeated` on this device, and return its path."""
        folder = self.root / "features"
        if not (folder / "manifest.json").exists():
            extract(self.extraction(data=str(self.repeated()), features=str(folder)), self.device)
        return folder


def measure() -> Iterator[Comparison]:
    """Measure seconds of an epoch, pictures a second, and both as shares of what the GPU can do."""
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        print(f"  skipped: {why}", flush=True)
        return
    yield from all_on(torch.device("cuda", 0), Sizes())


def all_on(device: torch.device, sizes: Sizes, names: Sequence[str] = ()) -> Iterator[Comparison]:
    """Yield the comparisons of the named sections on a device; of all sections if none is named."""
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(device, sizes, Path(temporary))
        for name in names or SECTIONS:
            yield from SECTIONS[name](bench)


# ------------------------------------------------------------------------------------------------ the machine


def machine(bench: Bench) -> Iterator[Comparison]:
    """Measure what the card can do: memory, matrix products, copies to and from main memory."""
    device = bench.device
    name = torch.cuda.get_device_name(device) if bench.cuda else "processor"
    bench.note(
        "machine",
        card=name,
        cores=usable_cores(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        copy_gb_s=bandwidth(bench) / 1e9,
        **{f"{kind}_tflop_s": matrix_rate(bench, kind) / 1e12 for kind in ("bfloat16", "tf32", "float32")},
        **_transfers(bench),
    )
    return
    yield


def bandwidth(bench: Bench) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.ones(bench.sizes.copied_bytes // 4, device=bench.device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(bench.sizes.repeats):
            target.copy_(source)

    best = min(_timed(run, bench.device) for _ in range(4))
    return 2 * bench.sizes.copied_bytes * bench.sizes.repeats / best


def matrix_rate(bench: Bench, kind: str = "bfloat16") -> float:
    """Return the floating point operations a second of products of square matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    side, repeats = bench.sizes.matrix, bench.sizes.repeats
    one = torch.randn(side, side, device=bench.device, dtype=dtype)

    def run() -> None:
        for _ in range(repeats):
            one @ one

    run()
    best = min(_timed(run, bench.device) for _ in range(3))
    torch.set_float32_matmul_precision(before)
    return 2 * side**3 * repeats / best


def _transfers(bench: Bench) -> dict[str, float]:
    if not bench.cuda:
        return {}
    here = torch.ones(1 << 28, dtype=torch.uint8)
    pinned, there = here.pin_memory(), torch.empty(1 << 28, dtype=torch.uint8, device=bench.device)
    runs: dict[str, Callable[[], object]] = {
        "to_gpu_pinned": lambda: there.copy_(pinned, non_blocking=True),
        "to_gpu_pageable": lambda: there.copy_(here),
        "from_gpu_pinned": lambda: pinned.copy_(there, non_blocking=True),
        "from_gpu_pageable": lambda: here.copy_(there),
    }
    return {
        f"{k}_gb_s": (1 << 28) / min(_timed(v, bench.device) for _ in range(3)) / 1e9 for k, v in runs.items()
    }


# ------------------------------------------------------------------------------------------------ backbones


def backbones(bench: Bench) -> Iterator[Comparison]:
    """Measure the convolutions of four models alone, on a batch that lies ready: the upper limit."""
    size, device = bench.sizes.image_size, bench.device
    for name in ("vgg16", "resnet50", "vit_b_16", "mobilenet_v2"):
        if not bench.cuda and name != "mobilenet_v2":
            continue
        module = (
            torchvision.models.get_model(name, weights=None, image_size=size)
            if name == "vit_b_16"
            else (
                torchvision.models.get_model(name, weights=None).get_submodule(
                    "features" if name != "resnet50" else ""
                )
            )
        )
        for attribute in ("fc", "heads"):
            if hasattr(module, attribute):
                setattr(module, attribute, nn.Identity())
        module = module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        operations = _operations(module, size)
        for kind in ("eager", "compiled") if bench.cuda and name == "vgg16" else ("eager",):
            for batch in (128, 512) if bench.cuda else (bench.sizes.bare_batch,):
                run = torch.compile(module) if kind == "compiled" else module
                began = time.perf_counter()
                try:
                    rate = _bare(run, batch, size, device)
                except RuntimeError as error:
                    bench.note(
                        "backbones", model=name, how=kind, batch=batch, failed=str(error).splitlines()[0][:200]
                    )
                    continue
                bench.note(
                    "backbones",
                    model=name,
                    how=kind,
                    batch=batch,
                    pictures_s=rate,
                    tflop_s=rate * operations / 1e12,
                    seconds_in_all=time.perf_counter() - began,
                )
    return
    yield


@torch.inference_mode()
def _bare(module: Callable[[torch.Tensor], object], batch: int, size: int, device: torch.device) -> float:
    """Measure how many pictures a second the bare convolutions take in bfloat16."""
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    repeats = max(2, 4096 // batch) if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(repeats):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                module(images)

    run()
    return batch * repeats / min(_timed(run, device) for _ in range(2))


def _operations(module: nn.Module, size: int) -> int:
    """Return the number of floating point operations on one picture."""
    device = next(module.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(torch.zeros(1, 3, size, size, device=device))
    return int(counter.get_total_flops())


# ------------------------------------------------------------------------------------------------ extraction


def extraction(bench: Bench) -> Iterator[Comparison]:
    """Compare extraction, from JPEGs or pictures in memory, with the bare backbone, and time its stages."""
    device, cuda = bench.device, bench.cuda
    config = bench.extraction(data=str(bench.pictures if cuda else bench.repeated()))
    paths = [str(p.relative_to(config.data.uri)) for p in sorted(Path(config.data.uri).rglob("*.jpg"))]
    for processes in (False, True):
        for workers in (1, usable_cores()) if cuda else (1,):
            rate = _decoding(config, paths, workers, processes=processes)
            bench.note(
                "decoding alone", by="processes" if processes else "threads", workers=workers, pictures_s=rate
            )
    if cuda:
        bench.note("nvJPEG alone", **_nvjpeg(config, paths[:1024], device))
    frozen = (
        models.build_frozen(config.model, config.data.image_size)
        .module.to(device)
        .to(memory_format=torch.channels_last)
    )
    size, batch = config.data.image_size, bench.sizes.bare_batch or BATCH[device.type]
    operations = _operations(frozen, size)
    bare = _bare(frozen, batch, size, device)
    bench.note("the bare backbone", pictures_s=bare, tflop_s=bare * operations / 1e12)
    many = configs.replace(config, data=str(bench.repeated()))
    for what, decoder, slices, chosen in (
        (
            ("in memory", "", 2, many),
            ("in memory", "", 4, many),
            ("in memory", "", 8, many),
            ("JPEGs", "cpu", 4, config),
            ("JPEGs", "cpu", 8, many),
            ("JPEGs", "nvjpeg", 4, config),
        )
        if cuda
        else (("in memory", "", 2, many), ("JPEGs", "cpu", 2, many))
    ):
        shutil.rmtree(bench.root / "extracted", ignore_errors=True)
        chosen = configs.replace(chosen, decoder=decoder or "cpu", features=str(bench.root / "extracted"))
        try:
            found = extract(chosen, device, slices, InMemory(size) if not decoder else None)
        except UserError as error:
            print(f"  left out: {error}", flush=True)
            continue
        bare = _bare(frozen, batch, size, device)
        yield summarize(
            f"extraction from {what}{decoder and ' by ' + decoder}, {slices} at a time / the bare backbone",
            [(found, bare)],
            unit="pictures/s",
            target=0 if decoder else 0.9,
        )
    rate = matrix_rate(bench)
    yield summarize(
        "the bare backbone / the rate of matrix products, bfloat16",
        [(bare * operations / 1e12, rate / 1e12)],
        unit="TFLOP/s",
        target=0,
    )


class InMemory:
    """Decoded pictures that lie in memory, in the place of files."""

    def __init__(self, size: int) -> None:
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (512, size, size, 3), generator=random, dtype=torch.uint8)
        self._decoded = [Decoded(bytes(DIGEST_BYTES), one) for one in pixels]

    def batches(self, paths: Sequence[str], size: int) -> Iterator[tuple[int, list[Decoded]]]:
        for start in range(0, len(paths), size):
            count = len(paths[start : start + size])
            yield start, [self._decoded[(start + i) % len(self._decoded)] for i in range(count)]


def extract(
    config: PreprocessConfig, device: torch.device, slices: int = 4, pictures: InMemory | None = None
) -> float:
    """Make a cache in this process, `slices` shards at a time, and return the pictures a second."""
    plan = build.make_plan(config)
    extractor = Extractor(config, plan.fingerprint, device, pictures=pictures)
    some = plan.shards.units[0].paths[:16]
    extractor.compute(some, plan.fingerprint.views)  # the decoders' start is no part of the rate
    with ThreadPoolExecutor(slices) as threads:
        built = build.build(
            config, plan, lambda units, store: threads.map(partial(store.process, extractor), units)
        )
    return built.computed / built.seconds


def _decoding(config: PreprocessConfig, paths: list[str], workers: int, *, processes: bool) -> float:
    """Return how many JPEGs a second are only read and decoded."""
    ahead = DecodeAhead(
        config.data.uri,
        config.data.image_size,
        config.data.resize,
        threads=workers,
        timeout=config.runtime.data_timeout,
        processes=processes,
    )
    list(ahead.batches(paths[: 16 * workers], 128))
    some = paths if workers > 1 else paths[:512]
    began = time.perf_counter()
    count = sum(len(batch) for _, batch in ahead.batches(some, 512))
    seconds = time.perf_counter() - began
    ahead.close()
    return count / seconds


def _nvjpeg(config: PreprocessConfig, paths: list[str], device: torch.device) -> dict[str, float]:
    """Return how many JPEGs a second from memory the GPU decodes, and then resizes one after the other."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import resize

    files = [
        torch.frombuffer(bytearray(Path(config.data.uri, p).read_bytes()), dtype=torch.uint8) for p in paths
    ]
    batches = [files[i : i + 128] for i in range(0, len(files), 128)]
    decoded: list[torch.Tensor] = []

    def run() -> None:
        decoded.clear()
        for batch in batches:
            decoded.extend(decode_jpeg(batch, mode=ImageReadMode.RGB, device=device))

    run()
    seconds = _timed(run, device)
    resizing = _timed(lambda: [resize(one, [224, 224], antialias=True) for one in decoded], device)
    return {"decoded_s": len(files) / seconds, "resized_s": len(files) / resizing}


# ------------------------------------------------------------------------------------------------ the epoch


def epochs(bench: Bench) -> Iterator[Comparison]:
    """Measure whole jobs on cached features: the book's classifier, and smaller heads."""
    floor_bandwidth = bandwidth(bench)
    features = bench.features()
    steps = -(-bench.sizes.cached // bench.sizes.batch)
    for kind in ("tf32", "bfloat16", "float32"):
        found = _trained(bench, f"epoch-{kind}", precision=kind, features=str(features))
        seconds = [one["train_total"] / one["samples_per_second"] for one in found["history"]][1:]
        floor = found["parameters"] * _BYTES_A_WEIGHT * steps / floor_bandwidth
        _note_job(bench, "epoch", found, precision=kind, floor_s=floor)
        yield summarize(
            f"epoch of {bench.sizes.cached:,} cached pictures, {kind} / {_SECONDS} s",
            [(one, _SECONDS) for one in seconds],
            unit="seconds",
            target=1,
            at_most=True,
        )
        yield summarize(
            f"the same, {kind} / its memory traffic's floor",
            [(one, floor) for one in seconds],
            unit="seconds",
            target=2,
            at_most=True,
        )


def heads(bench: Bench) -> Iterator[Comparison]:
    """Measure small heads, whose steps are bound by launches: without and with CUDA graphs."""
    features = bench.features()
    bytes_read = bench.sizes.cached * _values(bench) * 2
    for head in ("mlp", "linear"):
        for compile in ("none", "reduce-overhead") if bench.cuda else ("none",):
            changes = {"hidden_size": 0} if head == "linear" else {}
            found = _trained(
                bench,
                f"{head}-{compile}",
                recipe=f"dogs-cats-vgg16-{'probe' if head == 'linear' else head}",
                compile=compile,
                epochs=bench.sizes.epochs,
                features=str(features),
                **changes,
            )
            _note_job(bench, "head", found, head=head, compile=compile, floor_s=bytes_read / bandwidth(bench))
    return
    yield


def _values(bench: Bench) -> int:
    part = models.build_frozen(bench.config().model, bench.sizes.image_size)
    total = 1
    for side in part.feature_shape(3, bench.sizes.image_size, bench.sizes.image_size):
        total *= side
    return total


def _trained(
    bench: Bench, name: str, recipe: str = "dogs-cats-vgg16-features", **changes: Any
) -> dict[str, Any]:
    """Run a job in this process, and return what its newest checkpoint says about its epochs."""
    config = bench.config(
        recipe, **{"name": name, "epochs": bench.sizes.epochs, "keep_checkpoints": 1, **changes}
    )
    began = time.monotonic()
    finished = train(config)
    assert finished is not None
    seconds = time.monotonic() - began
    found = progress(bench.root / "runs" / name)
    state = torch.load(_newest(bench.root / "runs" / name) / "state.pt", weights_only=True, mmap=True)
    found["parameters"] = sum(v.numel() for k, v in state["model"].items() if not k.startswith("features."))
    found["seconds_in_all"] = seconds
    found["estimated"] = memory.estimate_for_config(config, bfloat16=config.loop.precision == "bfloat16").peak
    shutil.rmtree(bench.root / "runs" / name)
    return found


def _newest(run: Path) -> Path:
    return max(
        (p.parent for p in run.glob("*/checkpoint.json")),
        key=lambda p: (lambda at: (at["epoch"], at["position"]))(
            json.loads((p / "checkpoint.json").read_text())["progress"]
        ),
    )


def progress(run: Path) -> dict[str, Any]:
    """Return `progress` of the newest checkpoint in a run's folder."""
    found: dict[str, Any] = json.loads((_newest(run) / "checkpoint.json").read_text())["progress"]
    return found


def _note_job(bench: Bench, section: str, found: dict[str, Any], **more: Any) -> None:
    history = found["history"]
    best, last = max(history, key=lambda one: one["valid_correct"]), history[-1]
    trained = sorted(one["train_total"] / one["samples_per_second"] for one in history[1:] or history)
    whole = sorted(one["seconds"] for one in history[1:] or history)
    bench.note(
        section,
        **more,
        epoch_s=trained[len(trained) // 2],
        with_validation_s=whole[len(whole) // 2],
        samples_s=last["train_total"] / trained[len(trained) // 2],
        best=f"{best['valid_correct']}/{best['valid_total']} at {best['epoch']}",
        last=f"{last['valid_correct']}/{last['valid_total']}",
        train_loss=last["train_loss"],
        valid_loss=last["valid_loss"],
        peak_gb=max(one["peak_memory"] for one in history) / 1e9,
        seconds_in_all=found.get("seconds_in_all", 0.0),
    )


# ------------------------------------------------------------------------------------------------ jobs


def jobs(bench: Bench) -> Iterator[Comparison]:
    """Run jobs as a user starts them: the CNN from scratch and the transfer model, in several precisions."""
    digits = ["--data", str(bench.data / "mnist")] if bench.data else []
    short = [] if bench.data is None else ["--epochs", "3"]
    some = ["--epochs", str(bench.sizes.job_epochs)] if bench.sizes.job_epochs else []
    own = [] if bench.data else ["--model", bench.sizes.model, "--hidden-size", "8", "--image-size", "32"]
    vgg = [*own, "--weights", str(bench.weights), "--weights-preprocessing", bench.preprocessing, *some]
    cached = ["dogs-cats-vgg16-features", *vgg, "--features", str(bench.root / "cache-of-pictures")]
    pictures = ["--data", str(bench.pictures)]
    words = {
        "digits, torchrun": [*bench.sizes.digits, *digits],
        "digits, compiled": [bench.sizes.digits[0], *digits, *short, "--compile"],
        "digits, CUDA graphs": [bench.sizes.digits[0], *digits, *short, "--compile", "reduce-overhead"],
        "digits, bfloat16, channels_last": [
            bench.sizes.digits[0],
            *digits,
            *short,
            "--precision",
            "bfloat16",
            "--channels-last",
        ],
        "photographs, CNN": [
            "dogs-cats-cnn",
            *pictures,
            "--momentum",
            "0.9",
            *(["--image-size", "32", *some] if own else []),
        ],
        "VGG16 from pictures, torchrun": ["dogs-cats-vgg16", *vgg, *pictures],
        "VGG16 from pictures, tf32": ["dogs-cats-vgg16", *vgg, *pictures, "--precision", "tf32"],
        "VGG16 from pictures, contiguous": ["dogs-cats-vgg16", *vgg, *pictures, "--no-channels-last"],
        "VGG16 from pictures, compiled": ["dogs-cats-vgg16", *vgg, *pictures, "--compile"],
        "VGG16 from features, float32, no dropout": [*cached, "--precision", "float32", "--dropout", "0"],
        "VGG16 from features, tf32, torchrun": [*cached, "--precision", "tf32"],
        "VGG16 from features, bfloat16": [*cached, "--precision", "bfloat16"],
        "VGG16 from features, tf32, compiled": [*cached, "--precision", "tf32", "--compile"],
        "VGG16 from features, tf32, CUDA graphs": [
            *(*cached, "--precision", "tf32", "--compile", "reduce-overhead"),
        ],
    }
    extract(
        bench.extraction(data=str(bench.pictures), features=str(bench.root / "cache-of-pictures")), bench.device
    )
    for number, (what, arguments) in enumerate(words.items()):
        if (not bench.cuda and "--compile" in arguments) or not re.search(bench.jobs, what):
            continue
        name = f"job-{number}"
        run, table = bench.root / "runs" / name, ""
        if "torchrun" in what:
            done = torchrun(bench, *arguments, "--name", name)
            table = done.stdout
            if done.returncode or not run.exists():
                bench.note(
                    "job", what=what, failed=done.returncode, error="\n".join(done.stderr.splitlines()[-25:])
                )
                continue
        else:  # another process would be 10 seconds that tell nothing new
            try:
                train(_parsed(_command(bench, *arguments, "--name", name, "--runtime", "inline")))
            except Exception:
                bench.note("job", what=what, failed=1, error=traceback.format_exc()[-2000:])
                continue
        config = _parsed(_command(bench, *arguments))
        bfloat16 = config.loop.precision in ("bfloat16", "auto")
        found = progress(run) | {"estimated": memory.estimate_for_config(config, bfloat16=bfloat16).peak}
        _note_job(bench, "job", found, what=what, **_in_table(table))
        shutil.rmtree(run)
    return
    yield


def _parsed(command: list[str]) -> TrainConfig:
    config = cli.parse("train", command[command.index("jobs/train.py") + 1 :])
    assert config is not None
    return config


def torchrun(bench: Bench, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node 1 jobs/train.py ...` to its end."""
    return subprocess.run(
        _command(bench, *arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


def _command(bench: Bench, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = list(arguments)
    common = {
        "--tracking": "none",
        "--storage": str(bench.root / "runs"),
        "--cache": str(bench.root / "cache"),
        "--device": bench.device.type,
        "--keep-checkpoints": "1",
    }
    return [*launcher, "jobs/train.py", *words, *(w for pair in common.items() for w in pair)]


def _in_table(table: str) -> dict[str, str]:
    """Return what the table at a job's end says about its time and baseline."""
    rows = {
        name: line.split(name, 1)[1].strip()
        for line in table.splitlines()
        for name in ("time  ", "ridge probe")
        if name in line
    }
    return {name.strip().replace(" ", "_"): value for name, value in rows.items()}


# ------------------------------------------------------------------------------------------------ killed, full


def killed(bench: Bench) -> Iterator[Comparison]:
    """Kill a job in mid-epoch, run its command again, and compare with a run that was not disturbed."""
    vgg = ["--weights", str(bench.weights), "--weights-preprocessing", bench.preprocessing]
    own = [] if bench.data else ["--model", bench.sizes.model, "--hidden-size", "8", "--image-size", "32"]
    digits = ["--data", str(bench.data / "mnist")] if bench.data else []
    every = "200" if bench.data else "2"
    small = [bench.sizes.digits[0], *digits, "--epochs", "2", "--checkpoint-every", every]
    cnn = ["dogs-cats-cnn", "--data", str(bench.pictures), "--epochs", "2", "--checkpoint-every", "20"]
    cnn += ["--image-size", "32"] if own else []
    cached = [
        *("dogs-cats-vgg16-features", *own, *vgg, "--features", str(bench.features()), "--epochs", "2"),
        *("--precision", "bfloat16", "--checkpoint-every", every if own else "150"),
    ]
    sure = ["--deterministic"]
    cases = {
        "digits, float32": [*small, *sure],
        "VGG16's classifier, bfloat16, dropout": [*cached, *sure],
        "photographs, CNN, bfloat16": [*cnn, *sure],
        "digits, not deterministic, only again": small,
        "photographs, not deterministic, only again": cnn,
    }
    for number, (what, words) in enumerate(cases.items()):
        ends = []
        for kill in (False, True):
            name = f"killed-{number}-{kill}"
            run = bench.root / "runs" / name
            struck = _strike(bench, run, [*words, "--name", name]) if kill and "only again" not in what else ""
            done = torchrun(bench, *words, "--name", name)
            if done.returncode:
                bench.note(
                    "killed", what=what, failed=done.returncode, error="\n".join(done.stderr.splitlines()[-15:])
                )
                break
            resumed = "; ".join(re.findall(r"resuming +(.*)", done.stderr))
            ends.append(torch.load(_newest(run) / "state.pt", weights_only=True, map_location="cpu"))
        if len(ends) == 2:
            bench.note("killed", what=what, struck=struck, resumed=resumed, **_differences(*ends))
        for kill in (False, True):
            shutil.rmtree(bench.root / "runs" / f"killed-{number}-{kill}", ignore_errors=True)
    return
    yield


def full(bench: Bench) -> Iterator[Comparison]:
    """Run a job that is too large for the card, and note what it says and how it ends."""
    words = [
        "dogs-cats-vgg16",
        "--data",
        str(bench.pictures),
        "--trainable-stages",
        "5",
        "--precision",
        "float32",
    ]
    weights = ["--weights", str(bench.weights), "--weights-preprocessing", bench.preprocessing]
    for more in (
        ["--batch-size", "1600"],
        ["--valid-batch-size", "4000", "--batch-size", "8", "--epochs", "1"],
    ):
        if bench.cuda:
            config = _parsed(_command(bench, *words, *weights, *more))
            needed = memory.estimate_for_config(config, bfloat16=False)
            done = torchrun(bench, *words, *weights, *more, "--name", "full")
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            last = "" if lines else "\n".join(done.stderr.splitlines()[-20:])
            trace = "cvdist" in done.stderr and "Traceback" in done.stderr
            bench.note(
                "full", words=more, said=lines, foretold_gb=needed.peak / 1e9, traceback=trace, last=last
            )
            shutil.rmtree(bench.root / "runs" / "full", ignore_errors=True)
    return
    yield


def _strike(bench: Bench, run: Path, words: list[str]) -> str:
    """Start a job, kill it as soon as it has a mid-epoch checkpoint, and return the checkpoint's name."""
    job = subprocess.Popen(
        _command(bench, *words),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found: list[Path] = []
    try:
        while job.poll() is None and not (found := list(run.glob("[!.]*-step-*/checkpoint.json"))):
            time.sleep(0.02)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(job.pid)
            for process in [
                launcher,
                *launcher.children(recursive=True),
            ]:  # workers are in sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        job.wait()
    return found[0].parent.name if found else "it ended before"


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return which tensors of two checkpoints differ in their bits, and by how much."""
    pairs = [(k, v, other["model"][k]) for k, v in one["model"].items()]
    momentum = [
        (f"momentum {k}", v["momentum_buffer"], other["optimizer"]["state"][k]["momentum_buffer"])
        for k, v in one["optimizer"]["state"].items()
    ]
    unequal = [name for name, a, b in pairs + momentum if not torch.equal(a, b)]
    largest = max((float((a.double() - b.double()).abs().max()) for _, a, b in pairs), default=0.0)
    return {
        "tensors": len(pairs + momentum),
        "unequal": len(unequal),
        "which": unequal[:3],
        "largest_difference": largest,
    }


def profile(bench: Bench) -> Iterator[Comparison]:
    """Find out where the loop waits for the GPU, and how busy it keeps the GPU."""
    features = bench.features()
    cases = {
        "VGG16's classifier, tf32": {"features": str(features), "precision": "tf32"},
        "mlp head": {"features": str(features), "recipe": "dogs-cats-vgg16-mlp"},
        "VGG16 from pictures": {"recipe": "dogs-cats-vgg16", "data": str(bench.pictures)},
    }
    for number, (what, changes) in enumerate(cases.items()):
        name = f"profile-{number}"
        _finish(bench.device)
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = _trained(bench, name, epochs=2, log_every_steps=100, **changes)
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")
        places = collections.Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
        )
        steps = 2 * -(-found["history"][0]["train_total"] // bench.sizes.batch)
        bench.note("waits", what=what, steps=steps, places=dict(places.most_common(12)))
        if bench.cuda:
            _traced(bench, what, name, changes)
    return
    yield


def _traced(bench: Bench, what: str, name: str, changes: dict[str, Any]) -> None:
    """Note the share of an epoch's time in which no kernel ran, and how long each kernel takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as profiler:
        found = _trained(bench, name, epochs=2, log_every_steps=1000, ridge_probe=False, **changes)
    path = bench.root / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    # One loss a step; the middle of the last epoch.
    marks = sorted(e["ts"] for e in events if "nll_loss_forward" in e["name"])
    steps = -(-found["history"][0]["train_total"] // bench.sizes.batch)
    marks = marks[len(marks) // 2 + steps // 4 : len(marks) // 2 + 3 * steps // 4]
    if len(marks) < 2:
        bench.note("trace", what=what, failed="no step found", kernels=len(events))
        return
    begin, end = marks[0], marks[-1]
    inside = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if begin <= e["ts"] < end)
    busy, reached = 0.0, begin
    by_name: dict[str, float] = collections.defaultdict(float)
    for start, stop, kernel in inside:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
        by_name[kernel[:90]] += stop - start
    count = len(marks) - 1
    most = sorted(by_name.items(), key=lambda item: -item[1])[:14]
    bench.note(
        "trace",
        what=what,
        steps=count,
        step_us=(end - begin) / count,
        busy_us=busy / count,
        kernels_a_step=len(inside) / count,
        longest={kernel: round(t / count, 1) for kernel, t in most},
    )


SECTIONS: dict[str, Callable[[Bench], Iterator[Comparison]]] = {
    "machine": machine,
    "backbones": backbones,
    "extraction": extraction,
    "epochs": epochs,
    "heads": heads,
    "profile": profile,
    "jobs": jobs,
    "killed": killed,
    "full": full,
}


def _link(of: Path, to: Path) -> None:
    try:
        os.link(of, to)
    except OSError:  # another file system, or not ours
        shutil.copyfile(of, to)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device has finished a call of `run`."""
    _finish(device)
    started = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run sections one after the other. A section that fails does not end the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--root", type=Path, help="folder that is kept, for caches that later calls find again")
    parser.add_argument("--jobs", default="", help="pattern of the jobs to run, of the section jobs")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    chosen = parser.parse_args()
    device = torch.device("cpu") if chosen.tiny else torch.device("cuda", 0)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU: --tiny tries all of it on the CPU", file=sys.stderr)
        return 2
    failed = []
    with contextlib.ExitStack() as stack:
        root = chosen.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        chosen.output.mkdir(parents=True, exist_ok=True)
        bench = Bench(device, tiny() if chosen.tiny else Sizes(), root, chosen.output, chosen.jobs)
        for name in chosen.only:
            print(f"{name} ({SECTIONS[name].__doc__})", flush=True)
            began = time.monotonic()
            try:
                for one in SECTIONS[name](bench):
                    bench.note("comparison", **one.to_dict())
            except Exception as error:
                failed.append(name)
                traceback.print_exc()
                bench.note("FAILED", section_name=name, error=f"{type(error).__name__}: {str(error)[:300]}")
            bench.note("took", section_name=name, seconds=time.monotonic() - began)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
