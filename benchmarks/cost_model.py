"""Costs of transfer learning with VGG16: the tables of docs/scaling.md (h100) and of docs/kubernetes.md (l4).

    python benchmarks/cost_model.py h100 --matrix-share 0.4 --memory-share 0.7 --host-ms 1.0
    python benchmarks/cost_model.py l4 --gpu-hour 2.50
    python benchmarks/cost_model.py --figure docs/pictures/scaling.png h100

The time of a step comes from `cvdist.parallel.cost`, as in `--parallel auto`. The assumptions are arguments, so
that measured values can be put in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.figures import style
from cvdist.parallel import cost
from cvdist.parallel.cost import Machine, Work

GPUS = (1, 8, 16, 64, 256, 1024)
COUNTS = (500_000, 1_300_000, 10_000_000, 100_000_000, 1_000_000_000)
PRICED_COUNTS = (25_000, 1_300_000, 100_000_000)
BATCHES = (64, 1024)
LINKS = (400.0, 100.0, 25.0)
_FIRST, _SECOND, _LAST = 25088 * 4096 + 4096, 4096 * 4096 + 4096, 4096 * 2 + 2
_HOUR = 3600.0


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about machines and jobs. Rates are from data sheets: eight H100 (SXM) a node, or one L4."""

    matrix_tflops: float = 989.0
    """TFLOP/s of dense matrix products in bfloat16."""
    memory_gb_s: float = 3350.0
    """GB/s of GPU memory, read and written."""
    memory_gb: float = 80.0
    """GB of GPU memory."""
    nvlink_gb_s: float = 450.0
    """GB/s that a GPU sends to the others in its node."""
    gpus_per_node: int = 8
    """GPUs of a node, which share its link to other nodes."""
    matrix_share: float = 0.4
    """Share of the matrix rate that is reached, in the convolutions and in the classifier."""
    memory_share: float = 0.7
    """Share of the memory's rate that is reached."""
    link_share: float = 0.8
    """Share of a link's rate that is reached."""
    latency_us: float = 20.0
    """Microseconds of the smallest all-reduce within a node."""
    hop_us: float = 10.0
    """Microseconds from node to node. A tree of nodes is climbed up and down."""
    host_ms: float = 1.0
    """Milliseconds that Python and the launches of a step take. No step is shorter, whatever the GPU does."""
    gathered_gb_s: float = 3.0
    """GB/s at which a worker's thread collects a batch from the node's memory, where the features do not fit
    into the GPU's."""
    device_share: float = 0.5
    """Share of the GPU's memory that features may take, as in `cvdist.features.open`."""
    cores_per_gpu: int = 16
    """CPU cores for each GPU, which decode and decompress."""
    decoded_per_core: float = 250.0
    """Pictures that a core decodes a second. Measured: 500 at 500x375 pixels; these are taken to be larger."""
    decompressed_gb_s_per_core: float = 1.0
    """GB/s of features that a core decompresses. Measured with zstd, level 1."""
    picture_kb: float = 50.0
    """kB of a stored picture."""
    features_kb: float = 8.33
    """kB of a picture's features in the bucket. Measured on photographs of dogs and cats."""
    features_uncompressed_kb: float = 50.18
    """kB of a picture's features on a node's disk: 512x7x7 values of 16 bits."""
    forward_gflop: float = 30.7
    """GFLOP of VGG16's convolutions for a picture of 224x224. A multiplication and an addition are two."""
    batch_size: int = 1024
    """Pictures in a batch when all pictures are trained on. Small batches are bound by the weights' traffic."""
    epochs: int = 5
    """Epochs of training, as in the recipe `dogs-cats-vgg16-features`."""
    network_gbit_s: float = 25.0
    """Gbit/s from a node to the bucket, in the table of costs."""
    start_minutes: float = 6.0
    """Minutes until pods run and Ray has started: nodes boot and pull the image. Paid for all GPUs of a job."""
    deadline_hours: float = 4.0
    """Hours in which extraction has to end, which decides how many GPUs it takes."""
    gpu_hour: float = 3.0
    """Price of a GPU with its part of a node for an hour."""
    gb_month: float = 0.023
    """Price of a GB in the bucket for a month."""


H100 = Assumptions()
L4 = Assumptions(
    matrix_tflops=121.0, memory_gb_s=300.0, memory_gb=24.0, gpus_per_node=1, cores_per_gpu=7, gpu_hour=0.80
)


@dataclass(frozen=True)
class JobCost:
    """The cost of a data set. Hours include the start of the pods; without "gpu", they are wall-clock time."""

    extract_gpus: int
    extract_hours: float
    train_hours: float
    gpu_hours: float
    gpu_hours_without_cache: float


def work(batch: int) -> Work:
    """Return the work of a training step of VGG16's classifier for two classes, from a cache, in bfloat16."""
    return Work(
        batch=batch,
        # Forward, and backward for the weights and, behind the first layer, for what comes in.
        flops=4.0 * 25088 * 4096 + 6.0 * 4096 * 4096 + 6.0 * 4096 * 2,
        parameters=_FIRST + _SECOND + _LAST,
        split_parameters=_FIRST + _SECOND - 4096,
        columns=4096,
        activation_bytes=2,
        early_parameters=_SECOND + _LAST,
        input_bytes=2.0 * 25088,
    )


def resident(a: Assumptions, pictures: int) -> bool:
    """Return whether the features of so many pictures fit into the memory of each GPU."""
    return pictures * work(1).input_bytes < a.device_share * a.memory_gb * 1e9


def machine(a: Assumptions, gpus: int, gbit: float, pictures: int) -> Machine:
    """Return the rates of one of `gpus` GPUs, in nodes that are connected by `gbit` Gbit/s each.

    A ring all-reduce enters and leaves each node once, so the node's link is its slowest (Patarasuk and Yuan
    2009). A small all-reduce goes up and down a tree of nodes (Sanders, Speck and Träff 2009, Parallel
    Computing 35).
    """
    nodes = math.ceil(gpus / a.gpus_per_node)
    inside, between = a.nvlink_gb_s * 1e9, gbit / 8 * 1e9
    return Machine(
        matrix_rate=a.matrix_tflops * 1e12 * a.matrix_share,
        memory_rate=a.memory_gb_s * 1e9 * a.memory_share,
        link_rate=a.link_share * (min(inside, between) if nodes > 1 else inside),
        latency=1e-6 * (a.latency_us + 2 * math.ceil(math.log2(nodes)) * a.hop_us),
        input_rate=a.memory_gb_s * 1e9 * a.memory_share if resident(a, pictures) else a.gathered_gb_s * 1e9,
    )


def step(a: Assumptions, batch: int, gpus: int, gbit: float, *, split: bool, pictures: int = 0) -> float:
    """Return the seconds of GPU time of a step.

    Args:
        a: the assumptions.
        batch: size of the global batch.
        gpus: number of GPUs.
        gbit: rate of the link between nodes in Gbit/s.
        split: whether the head is split over the GPUs.
        pictures: size of the data set; 0 means that its features fit into GPU memory.
    """
    way = cost.split_head if split else cost.data_parallel
    return way(work(batch), machine(a, gpus, gbit, pictures), gpus).seconds


def epoch(a: Assumptions, pictures: int, gpus: int, gbit: float, *, split: bool) -> float:
    """Return the seconds of an epoch after the first, including the time of the host."""
    seconds = step(a, a.batch_size, gpus, gbit, split=split, pictures=pictures)
    return math.ceil(pictures / a.batch_size) * max(seconds, a.host_ms * 1e-3)


def first_read(a: Assumptions, pictures: int, gbit: float) -> float:
    """Return the seconds until a node has all features, bound by its link or by decompression."""
    fetched = pictures * a.features_kb * 1e3 / (a.link_share * gbit / 8 * 1e9)
    cores = a.cores_per_gpu * a.gpus_per_node
    unpacked = pictures * a.features_uncompressed_kb * 1e3
    return max(fetched, unpacked / (cores * a.decompressed_gb_s_per_core * 1e9))


def extraction_rate(a: Assumptions) -> float:
    """Return how many pictures per second a GPU with its CPU cores extracts, bound by the slower of the two."""
    arithmetic = a.matrix_tflops * 1e12 * a.matrix_share / (a.forward_gflop * 1e9)
    return min(arithmetic, a.cores_per_gpu * a.decoded_per_core)


def job_cost(a: Assumptions, pictures: int) -> JobCost:
    """Return the cost of extracting one view of all pictures and training once, on one GPU."""
    start = a.start_minutes / 60
    alone = pictures / extraction_rate(a) / _HOUR
    gpus = max(1, math.ceil(alone / a.deadline_hours))
    each = epoch(a, pictures, 1, a.network_gbit_s, split=False)
    # The first epoch waits for the features where they come more slowly than they are used.
    train = (max(each, first_read(a, pictures, a.network_gbit_s)) + (a.epochs - 1) * each) / _HOUR
    return JobCost(
        extract_gpus=gpus,
        extract_hours=alone / gpus + start,
        train_hours=train + start,
        gpu_hours=alone + gpus * start + train + start,
        gpu_hours_without_cache=a.epochs * alone + train + gpus * start,
    )


def steps_table(a: Assumptions) -> str:
    """Format the milliseconds of a step by number of GPUs, in Markdown."""
    lines = [
        "| batch | split | between nodes | " + " | ".join(_gpus(gpus) for gpus in GPUS) + " |",
        "| --- " * (3 + len(GPUS)) + "|",
    ]
    for batch in BATCHES:
        for split, gbit in ((s, g) for s in (False, True) for g in LINKS):
            values = [f"{1e3 * step(a, batch, gpus, gbit, split=split):,.2f}" for gpus in GPUS]
            name = "`head`" if split else "`data`"
            lines.append(f"| {batch:,} | {name} | {gbit:g} Gbit/s | " + " | ".join(values) + " |")
    return "\n".join(lines)


def data_table(a: Assumptions) -> str:
    """Format bytes and times by number of pictures, in Markdown."""
    rate = extraction_rate(a)
    rows = _bytes_rows(a, COUNTS)
    rows.append(("in the memory of each GPU", ["yes" if resident(a, n) else "no" for n in COUNTS]))
    for gpus in (1, 8, 64, 1024):
        rows.append((f"extraction, {_gpus(gpus)}", [_time(n / rate / gpus) for n in COUNTS]))
    for gbit in LINKS:
        seconds = [_time(first_read(a, n, gbit)) for n in COUNTS]
        rows.append((f"first read of the features, {gbit:g} Gbit/s", seconds))
    for gpus, gbit in ((1, 100.0), (8, 100.0), (64, 400.0), (64, 25.0)):
        ways = (False,) if gpus == 1 else (False, True)
        for split in ways:
            seconds = [_time(epoch(a, n, gpus, gbit, split=split)) for n in COUNTS]
            between = f" at {gbit:g} Gbit/s" if gpus > a.gpus_per_node else ""
            way = "" if gpus == 1 else ", `head`" if split else ", `data`"
            rows.append((f"an epoch, {_gpus(gpus)}{between}{way}", seconds))
    return _by_count([f"{n / 1e6:,g} million" for n in COUNTS], rows)


def cost_table(a: Assumptions) -> str:
    """Format what a job costs by number of pictures, in Markdown."""
    costs = [job_cost(a, n) for n in PRICED_COUNTS]
    stored = [n * (a.picture_kb + a.features_kb) / 1e6 for n in PRICED_COUNTS]
    rows = _bytes_rows(a, PRICED_COUNTS)
    rows += [
        ("extraction: GPUs, hours", [f"{c.extract_gpus} x {_time(c.extract_hours * _HOUR)}" for c in costs]),
        ("training, one GPU: hours", [_time(c.train_hours * _HOUR) for c in costs]),
        ("GPU hours in all", [_time(c.gpu_hours * _HOUR) for c in costs]),
        ("the same without a cache", [_time(c.gpu_hours_without_cache * _HOUR) for c in costs]),
        ("GPUs, once", [f"${c.gpu_hours * a.gpu_hour:,.2f}" for c in costs]),
        ("bucket, a month", [f"${size * a.gb_month:,.2f}" for size in stored]),
    ]
    return _by_count([f"{count:,} pictures" for count in PRICED_COUNTS], rows)


def _bytes_rows(a: Assumptions, counts: Sequence[int]) -> list[tuple[str, list[str]]]:
    return [
        ("pictures in the bucket", [_size(n * a.picture_kb) for n in counts]),
        ("features in the bucket", [_size(n * a.features_kb) for n in counts]),
        ("features on each node", [_size(n * a.features_uncompressed_kb) for n in counts]),
    ]


def _by_count(counts: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = ["| | " + " | ".join(counts) + " |", "| --- " * (len(counts) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(values) + " |" for name, values in rows)])


def ends_table(a: Assumptions) -> str:
    """Format the number of GPUs up to which each variant gains, in Markdown."""
    lines = ["| batch | between nodes | `data`: GPUs, gain over one | `head`: GPUs, gain over one |"]
    lines.append("| --- " * 4 + "|")
    for batch in BATCHES:
        for gbit in LINKS:
            told = []
            for split in (False, True):
                gpus = most_useful(a, batch, gbit, split=split)
                gain = step(a, batch, 1, gbit, split=False) / step(a, batch, gpus, gbit, split=split)
                told.append(f"{gpus:,}, {gain:.1f}x")
            lines.append(f"| {batch:,} | {gbit:g} Gbit/s | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def shares_table(a: Assumptions) -> str:
    """Format the pictures per GPU at which data-parallel steps compute as long as they communicate."""
    places = [("within a node", 8, LINKS[0]), *((f"{gbit:g} Gbit/s between nodes", 64, gbit) for gbit in LINKS)]
    lines = ["| " + " | ".join(name for name, _, _ in places) + " |", "| --- " * len(places) + "|"]
    shares = []
    for _, gpus, gbit in places:
        waited = cost.data_parallel(work(gpus), machine(a, gpus, gbit, 0), gpus).communication
        shares.append(waited * a.matrix_tflops * 1e12 * a.matrix_share / work(1).flops)
    return "\n".join([*lines, "| " + " | ".join(f"{round(share, -2):,.0f}" for share in shares) + " |"])


def most_useful(a: Assumptions, batch: int, gbit: float, *, split: bool) -> int:
    """Return the smallest power of two of GPUs whose step is at most 10% longer than the shortest possible."""
    seconds = {2**i: step(a, batch, 2**i, gbit, split=split) for i in range(11)}
    return next(gpus for gpus, own in seconds.items() if own <= 1.1 * min(seconds.values()))


def draw(a: Assumptions, path: Path) -> None:
    """Draw the milliseconds of a step by number of GPUs, for both variants and each link; a panel per batch."""
    figure = style.new_figure(
        "More GPUs make a step longer, or, with the head split, shorter",
        "VGG16's classifier from features in GPU memory, by the cost model: H100s, eight to a node",
        width=9.2,
        height=5.0,
    )
    panels = figure.subplots(1, len(BATCHES))
    numbers = [2**i for i in range(11)]
    for place, batch in enumerate(BATCHES):
        axes = style.plain(panels[place], grid="y")
        for split, color in ((False, style.VERMILLION), (True, style.BLUE)):
            ends: list[tuple[float, str]] = []
            for gbit, line in sorted(zip(LINKS, ("-", "--", ":"), strict=True), reverse=True):
                values = [1e3 * step(a, batch, gpus, gbit, split=split) for gpus in numbers]
                axes.plot(numbers, values, line, color=color, linewidth=1.8)
                lowest = ends[-1][0] * 1.7 if ends else 0.0  # so that no label lies on another
                ends.append((max(values[-1], lowest), f"{gbit:g}"))
            for value, text in ends:
                axes.annotate(
                    text, (numbers[-1], value), (5, 0), textcoords="offset points", va="center",
                    color=color, size=style.SMALL_SIZE, annotation_clip=False,
                )  # fmt: skip
        axes.axhline(a.host_ms, color=style.MUTED, linewidth=0.9)
        axes.set(xscale="log", yscale="log", xlim=(1, 1024), ylim=(0.03, 1000))
        axes.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
        axes.set_yticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", "1,000"])
        axes.minorticks_off()
        axes.set(xlabel="GPUs", ylabel="milliseconds a step")
        axes.set_title(f"{batch:,} pictures a step", loc="left", size=style.LABEL_SIZE, color=style.INK)
        _write(axes, 1.1, 9, "data-parallel", style.VERMILLION)
        _write(axes, 1.2, 0.2, "head split", style.BLUE)
        if not place:
            _write(axes, 7, a.host_ms * 1.5, f"the host takes {a.host_ms:g} ms", style.MUTED)
    figure.supxlabel(
        "At the lines' ends: Gbit/s between nodes", x=0.98, ha="right", size=style.SMALL_SIZE, color=style.MUTED
    )
    style.save_png(figure, path)


def _write(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    axes.text(x, y, text, color=color, size=style.SMALL_SIZE, va="center")


def _gpus(count: int) -> str:
    return f"{count:,} GPU" + ("s" if count > 1 else "")


def _size(kilobytes: float) -> str:
    gigabytes = kilobytes / 1e6
    return f"{gigabytes / 1000:,.1f} TB" if gigabytes >= 1000 else f"{gigabytes:,.1f} GB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:,.1f} h"


def main(
    machines: Annotated[Assumptions, tyro.conf.subcommand("h100", default=H100)]
    | Annotated[Assumptions, tyro.conf.subcommand("l4", default=L4)] = H100,
    figure: Path | None = None,
) -> None:
    """Print the tables.

    Args:
        machines: the machines, and all that is assumed about them and the job.
        figure: PNG file to draw the figure to.
    """
    for table in (steps_table, ends_table, shares_table, data_table, cost_table):
        print(table(machines) + "\n")
    if figure is not None:
        draw(machines, figure)


if __name__ == "__main__":
    about = (__doc__ or "").strip().splitlines()[0]
    tyro.cli(main, description=about, config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes))
