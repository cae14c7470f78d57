"""What VGG16 by transfer learning costs on a cluster: GPUs, hours, bytes, money; the assumptions are arguments.

    python benchmarks/cost_model.py --gpu-hour 2.50 --gpu-tflops 989 --gpu-memory-gb-s 3350 --cores-per-gpu 16

Extraction is limited by arithmetic or by decoding, whichever is slower. Training from the cache is limited by
arithmetic and memory traffic, since each step reads and writes all weights. On several GPUs the exchange of
gradients (`--network-gbit-s`) would cost more than they save for this classifier, so it is trained on one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COUNTS = (25_000, 1_300_000, 100_000_000)
_HOUR = 3600.0


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of the cost model."""

    gpu_tflops: float = 121.0
    """Of bfloat16, dense, as the data sheet says: an NVIDIA L4."""
    gpu_memory_gb_s: float = 300.0
    """Its memory bandwidth."""
    utilization: float = 0.4
    """Share of both that is reached."""
    cores_per_gpu: int = 7
    """Cores that decode for one GPU."""
    decoded_per_core: float = 250.0
    """Pictures that a core decodes a second. Measured: 500 at 500x375 pixels; these are taken to be larger."""
    picture_kb: float = 50.0
    """Of a picture, as it is stored."""
    features_kb: float = 8.33
    """Of its features in the bucket. Measured, on photographs of dogs and cats."""
    features_uncompressed_kb: float = 50.18
    """The same on a node's disk: 512x7x7 values of 16 bits."""
    forward_gflop: float = 30.7
    """Of VGG16's convolutions, for a picture of 224x224."""
    classifier_weights_m: float = 119.5
    """Millions of weights that are trained."""
    batch_size: int = 1024
    """Of training. Small batches are bound by the weights' traffic."""
    epochs: int = 5
    """Of training, as in the recipe `dogs-cats-vgg16-features`."""
    network_gbit_s: float = 25.0
    """Of a node, to the bucket and to other nodes."""
    decompressed_gb_s_per_core: float = 1.0
    """Measured: zstd, level 1, GB of features."""
    start_minutes: float = 6.0
    """Until pods run and Ray has started: nodes that boot and pull the image. Paid for by all GPUs of a job."""
    deadline_hours: float = 4.0
    """As many GPUs are taken as extraction needs to be over within this time."""
    gpu_hour: float = 0.80
    """Price of a node with one GPU for an hour."""
    gb_month: float = 0.023
    """Price of a GB in the bucket for a month."""


@dataclass(frozen=True)
class Cost:
    """The cost of one data set. Hours are wall-clock time and include the start of the pods."""

    pictures: int
    pictures_gb: float
    features_gb: float
    node_gb: float
    extract_gpus: int
    extract_hours: float
    train_hours: float
    gpu_hours: float
    gpu_hours_without_cache: float
    compute_price: float
    month_price: float


def extraction_rate(a: Assumptions) -> float:
    """Return how many pictures per second one GPU with its CPU cores extracts."""
    arithmetic = a.gpu_tflops * 1e12 * a.utilization / (a.forward_gflop * 1e9)
    return min(arithmetic, a.cores_per_gpu * a.decoded_per_core)


def step_seconds(a: Assumptions, gpus: int = 1) -> float:
    """Return the seconds of a training step of the classifier from the cache, with the batch on `gpus` GPUs.

    Forward and backward pass take 6 operations per weight and sample. Weights, gradients and momentum are each
    read and written once, 4 bytes per value. A ring all-reduce moves 2 (n-1)/n of the gradients through each
    node (Patarasuk and Yuan 2009).
    """
    weights = a.classifier_weights_m * 1e6
    arithmetic = 6 * weights * (a.batch_size / gpus) / (a.gpu_tflops * 1e12 * a.utilization)
    traffic = 6 * 4 * weights / (a.gpu_memory_gb_s * 1e9 * a.utilization)
    exchange = 2 * (gpus - 1) / gpus * 4 * weights / (a.network_gbit_s / 8 * 1e9)
    return arithmetic + traffic + exchange


def cost(pictures: int, a: Assumptions) -> Cost:
    """Return the cost of extracting and training once, for a number of pictures with one view each."""
    start = a.start_minutes / 60
    alone = pictures / extraction_rate(a) / _HOUR
    gpus = max(1, math.ceil(alone / a.deadline_hours))
    extract = alone / gpus
    # The first epoch waits for the features where they come more slowly than they are used.
    fetched = pictures * a.features_kb * 1e3 / (a.network_gbit_s / 8 * 1e9)
    unpacked = (
        pictures * a.features_uncompressed_kb * 1e3 / (a.decompressed_gb_s_per_core * 1e9 * a.cores_per_gpu)
    )
    epoch = pictures / a.batch_size * step_seconds(a)
    train = (max(epoch, fetched, unpacked) + (a.epochs - 1) * epoch) / _HOUR
    gpu_hours = gpus * (extract + start) + train + start
    features_gb, pictures_gb = pictures * a.features_kb / 1e6, pictures * a.picture_kb / 1e6
    return Cost(
        pictures=pictures,
        pictures_gb=pictures_gb,
        features_gb=features_gb,
        node_gb=pictures * a.features_uncompressed_kb / 1e6,
        extract_gpus=gpus,
        extract_hours=extract + start,
        train_hours=train + start,
        gpu_hours=gpu_hours,
        gpu_hours_without_cache=a.epochs * alone + train + gpus * start,
        compute_price=gpu_hours * a.gpu_hour,
        month_price=(features_gb + pictures_gb) * a.gb_month,
    )


def table(a: Assumptions) -> str:
    """Format the table of docs/kubernetes.md, in Markdown."""
    costs = [cost(count, a) for count in COUNTS]
    rows = [
        ("pictures in the bucket", [_gigabytes(c.pictures_gb) for c in costs]),
        ("features in the bucket", [_gigabytes(c.features_gb) for c in costs]),
        ("features on a node's disk", [_gigabytes(c.node_gb) for c in costs]),
        ("extraction: GPUs, hours", [f"{c.extract_gpus} x {_hours(c.extract_hours)}" for c in costs]),
        ("training, one GPU: hours", [_hours(c.train_hours) for c in costs]),
        ("GPU hours in all", [_hours(c.gpu_hours) for c in costs]),
        ("the same without a cache", [_hours(c.gpu_hours_without_cache) for c in costs]),
        ("GPUs, once", [f"${c.compute_price:,.2f}" for c in costs]),
        ("bucket, a month", [f"${c.month_price:,.2f}" for c in costs]),
    ]
    lines = ["| | " + " | ".join(f"{count:,} pictures" for count in COUNTS) + " |"]
    lines.append("| --- " * (len(COUNTS) + 1) + "|")
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join(lines)


def _gigabytes(value: float) -> str:
    return f"{value / 1000:,.1f} TB" if value >= 1000 else f"{value:,.1f} GB"


def _hours(value: float) -> str:
    return f"{value:,.1f} h" if value >= 1 else f"{value * 60:,.0f} min"


def main() -> None:
    """Print the table and the rates that it is based on."""
    import tyro

    chosen = tyro.cli(Assumptions, description=(__doc__ or "").strip().splitlines()[0])
    print(table(chosen))
    print(f"\nextraction     {extraction_rate(chosen):,.0f} pictures/s a GPU")
    for gpus, where in ((1, "one GPU"), (8, "eight nodes with one GPU each")):
        seconds = step_seconds(chosen, gpus)
        rate = chosen.batch_size / seconds
        print(f"training       {rate:,.0f} samples/s on {where}, {seconds * 1e3:,.1f} ms a step")


if __name__ == "__main__":
    main()
