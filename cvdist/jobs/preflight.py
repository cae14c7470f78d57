"""Checks before GPUs are spent: is all that a job needs there, on every node, and how fast is it?

Each node is looked at by a task of its own. The workers' places are then filled with short-lived actors that
measure the link as training does (`cvdist.parallel.measure`), by PyTorch's own collectives and not by Ray's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cvdist import config as configs
from cvdist import loaders, log, models, storage, tracking
from cvdist.config import TrainConfig, cache_folder, storage_root
from cvdist.data.forms import root_of
from cvdist.data.images.ahead import Reader
from cvdist.data.images.listing import list_pictures
from cvdist.data.labels import is_multilabel
from cvdist.distributed.precision import choose_precision
from cvdist.distributed.traffic import ring_bytes
from cvdist.errors import UserError
from cvdist.features import maintenance
from cvdist.features import open as features
from cvdist.parallel import can_split, measure
from cvdist.runtime import ray_cluster
from cvdist.runtime.ray_cluster import ResourceRequest
from cvdist.training import memory

_PACKAGES = ("cvdist", "torch", "ray", "mlflow")
_SMALL_SHM = 1 << 30  # bytes; Ray's object store lies there, and falls back to a slow disk
_NODE_SECONDS = 40.0
_REDUCE_SECONDS = 50.0
_SAMPLES = 8


@dataclass(frozen=True)
class Row:
    """One finding: what was checked, where, what was found, and what to do about it (empty if all is well)."""

    what: str
    where: str
    found: str
    problem: str = ""


@dataclass(frozen=True)
class PreflightResult:
    """What was found, line by line, and seconds from start to end."""

    rows: list[Row]
    seconds: float


def preflight(config: TrainConfig) -> PreflightResult:
    """Look at everything that the training `config` would use. Takes less than a minute.

    Raises:
        UserError: if no training can work with the settings, or the cluster itself can't be reached or is too
            small.
    """
    began = time.monotonic()
    configs.check(config)
    config = models.with_preprocessing(config)
    # The nodes' processes may not have the environment variables of this one.
    here = {
        "storage": storage_root(config.run.storage),
        "cache": str(cache_folder(config.data.cache)),
        "tracking_uri": config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", ""),
    }
    ray_cluster.connect(ResourceRequest.of_workers(config.runtime))
    return PreflightResult(list(_rows(configs.replace(config, **here))), time.monotonic() - began)


def _rows(config: TrainConfig) -> Iterator[Row]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0)(_look_at_node)
    pending = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            configs.to_dict(config)
        ): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in nodes
    }
    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_NODE_SECONDS)
    versions: dict[str, list[str]] = {}
    for task, where in pending.items():
        if task not in done:
            yield Row(
                "node", where, f"no answer within {_NODE_SECONDS:g} s", "is its network or its memory full?"
            )
            continue
        try:
            found, rows = ray.get(task)
        except ray.exceptions.RayError as error:
            yield Row("node", where, str(error).strip().splitlines()[-1][:100], "repair or remove this node")
            continue
        versions.setdefault(found, []).append(where)
        yield from (dataclasses.replace(row, where=where) for row in rows)
    if len(versions) > 1:
        counts = "; ".join(f"{found} on {len(places)}" for found, places in versions.items())
        yield Row("versions", "all nodes", counts, "nodes differ: use one image for all of them")
    else:
        yield Row("versions", "all nodes", next(iter(versions), "unknown"))
    yield _guarded("MLflow", "the driver", lambda: _mlflow(config))
    classes = 2  # where the data can't be read, which is a row of its own

    def data() -> str:
        nonlocal classes
        found, classes = look_at_data(config)
        return found

    yield _guarded("data", "the driver", data)
    yield from _all_reduce(config, classes)


def _look_at_node(values: dict[str, Any]) -> tuple[str, list[Row]]:
    """Check the node that this runs on. Returns its versions, and the findings without the node's name."""
    config = configs.from_dict(TrainConfig, values)
    versions = f"Python {platform.python_version()}, " + ", ".join(
        f"{name} {_version(name)}" for name in _PACKAGES
    )
    rows = []
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if devices and config.runtime.device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        rows.append(_guarded("GPU memory", "", lambda: _gpu_memory(config, total)))
    ram = psutil.virtual_memory()
    found = (
        f"{os.cpu_count()} cores, {', '.join(devices) or 'no GPU'}, {ram.available / 2**30:.1f} of "
        f"{ram.total / 2**30:.1f} GiB memory free"
    )
    full = ram.available <= ram.total / 20
    rows.append(Row("machine", "", found, "its memory is almost full" if full else ""))
    if Path("/dev/shm").exists():
        size = shutil.disk_usage("/dev/shm").total
        problem = "too small for Ray and PyTorch: mount a memory-backed volume there"
        rows.append(Row("/dev/shm", "", f"{size / 2**30:.2f} GiB", problem if size < _SMALL_SHM else ""))
    cache = cache_folder(config.data.cache)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    problem = "" if free > 1 << 30 else "less than 1 GiB: see --cache"
    rows.append(Row("cache", "", f"{free / 2**30:.1f} GiB free in {cache}", problem))
    rows.append(_guarded("storage", "", lambda: _storage(config)))
    rows.append(_guarded("MLflow", "", lambda: _health(config)))
    return versions, [row for row in rows if row.found]


def _gpu_memory(config: TrainConfig, total: int) -> str:
    """Say how much memory a worker needs of a GPU with `total` bytes, and refuse a GPU with too little."""
    half = choose_precision(config.loop.precision, torch.device("cuda", 0), training=True).half
    needed = memory.estimate_for_config(config, bfloat16=half is not None)
    found = f"a worker needs about {needed}, of {total / 1e9:,.1f} GB"
    if needed.peak > total:
        raise UserError(f"{found}: {memory.advice(config)}")
    return found


def _storage(config: TrainConfig) -> str:
    """Write, read and delete a megabyte, and say how many milliseconds each took."""
    folder = storage.Folder.open(f"{storage_root(config.run.storage)}/.preflight", "--storage")
    name, content = f"{socket.gethostname()}-{os.getpid()}", random.randbytes(1 << 20)
    times = []
    for act in (lambda: folder.write(name, content), lambda: folder.read(name), lambda: folder.delete(name)):
        began = time.monotonic()
        answer = act()
        times.append(1e3 * (time.monotonic() - began))
        if isinstance(answer, bytes) and answer != content:
            raise UserError(f"--storage {folder.uri} returns other bytes than were written")
    return f"write {times[0]:.0f} ms, read {times[1]:.0f} ms, delete {times[2]:.0f} ms for 1 MiB"


def _health(config: TrainConfig) -> str:
    """Say in how many milliseconds MLflow's server answers this node; empty if there is no server."""
    uri = config.tracking.uri
    if config.tracking.mode == "none" or not uri.startswith("http"):
        return ""
    began = time.monotonic()
    tracking.require_server(uri, config.tracking.timeout)
    return f"answers in {1e3 * (time.monotonic() - began):.0f} ms"


def _mlflow(config: TrainConfig) -> str:
    store = tracking.open_tracking_store(config.tracking, config.run.storage)
    return (
        "not used"
        if store is None
        else f"experiment {config.tracking.experiment} in {log.redact(store.tracking_uri)}"
    )


def look_at_data(config: TrainConfig) -> tuple[str, int]:
    """Decode some pictures, or check a feature cache. Returns what was found, and the number of classes."""
    if config.features.uri:
        manifest = features.open_manifest(config)[1]
        loaders.check_labels(config, multilabel=manifest.multilabel)
        first = str(maintenance.describe(config.features.uri)).strip().splitlines()[0]
        return first, len(manifest.classes)
    if config.data.dataset != "images":
        return f"{config.data.dataset}: comes with the package, or is downloaded", 10
    listed = list_pictures(config.data)
    multilabel = is_multilabel(listed.table)
    loaders.check_labels(config, multilabel=multilabel)
    paths = listed.table.column("path").to_pylist()
    chosen = random.Random(0).sample(paths, min(_SAMPLES, len(paths)))
    reader = Reader(root_of(config.data), config.data.image_size, config.data.resize)
    began = time.monotonic()
    decoded = zip(chosen, reader.decode(chosen), strict=True)
    bad = [f"{path} ({one.reason})" for path, one in decoded if one.pixels is None]
    if bad:
        raise UserError(f"{len(bad)} of {len(chosen)} pictures can't be decoded: {bad[0]}")
    each = 1e3 * (time.monotonic() - began) / max(len(chosen), 1)
    classes = f"{len(listed.classes)} classes" + ", several a picture" * multilabel
    found = f"{len(paths):,} pictures in {classes}, {each:.0f} ms to read and decode one"
    return found, len(listed.classes)


def summed_bytes(config: TrainConfig, workers: int, classes: int | None = None) -> int:
    """Return the bytes of activations that a step sums with a split head; 0 if the head can't be split."""
    layers = can_split(memory.skeleton(config, classes), workers)
    return 4 * config.loop.batch_size * layers[1].out_features if layers else 0


def _all_reduce(config: TrainConfig, classes: int) -> Iterator[Row]:
    """Measure the bandwidth between the workers, and yield how long a step's exchange takes."""
    count, _ = config.runtime.worker_range
    if count < 2:
        yield Row("all-reduce", "workers", "one worker: nothing to exchange")
        return
    use_gpu = ray_cluster.require_resources(ResourceRequest.of_workers(config.runtime))
    bundle = {"CPU": float(config.runtime.cpus_per_worker)} | ({"GPU": 1.0} if use_gpu else {})
    group = placement_group([bundle] * count, strategy="SPREAD")
    actors: list[Any] = []
    try:
        if not group.wait(_REDUCE_SECONDS):
            yield Row("all-reduce", "workers", "no room now", "other jobs hold the CPUs or GPUs: wait for them")
            return
        actor = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0))(_Reducer)
        actors = [
            actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote(
                i, count, use_gpu
            )
            for i in range(count)
        ]
        address = ray.get(actors[0].address.remote(), timeout=_REDUCE_SECONDS)
        rate = ray.get([a.measure.remote(address) for a in actors], timeout=_REDUCE_SECONDS)[0]
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        first = str(error).strip().splitlines()[-1][:120]
        yield Row(
            "all-reduce", "workers", first, "can the nodes reach each other on all ports? GLOO_SOCKET_IFNAME?"
        )
        return
    finally:
        for running in actors:
            ray.kill(running)
        remove_placement_group(group)

    def exchange(size: float) -> str:
        return f"{size / 1e6:,.1f} MB in {1e3 * ring_bytes(size, count) / rate:,.0f} ms"

    needs = f"a step averages {exchange(4 * memory.trained_parameters(config, classes))}"
    if summed := summed_bytes(config, count, classes):
        needs += f", or sums {exchange(summed)} with --parallel head"
    yield Row("all-reduce", f"{count} workers", f"{rate / 1e6:,.0f} MB/s each way; {needs}")


class _Reducer:
    """An actor that takes part in measuring the link between the workers."""

    def __init__(self, rank: int, count: int, use_gpu: bool) -> None:
        self._rank, self._count, self._use_gpu = rank, count, use_gpu

    def address(self) -> str:
        """Return the address, with a free port, at which the other workers reach rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def measure(self, address: str) -> float:
        """Measure how many bytes per second a worker sends in an all-reduce."""
        dist.init_process_group(
            "nccl" if self._use_gpu else "gloo",
            init_method=address,
            rank=self._rank,
            world_size=self._count,
            timeout=timedelta(seconds=_REDUCE_SECONDS),
        )
        rate, _ = measure.link(torch.device("cuda" if self._use_gpu else "cpu"))
        dist.destroy_process_group()
        return rate


def _guarded(what: str, where: str, probe: Callable[[], str]) -> Row:
    try:
        return Row(what, where, probe())
    except UserError as error:
        return Row(what, where, "FAILED", str(error))
    except OSError as error:
        return Row(what, where, "FAILED", storage.reason(error))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a folder" if package == "cvdist" else "missing"


def exit_code(result: PreflightResult) -> int:
    """Return 1 if something has to be done, else 0."""
    return int(any(row.problem for row in result.rows))


def table(result: PreflightResult) -> str:
    """Format what was found, and below each problem what to do about it."""
    rows = result.rows
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("what", "where")]
    lines = [""]
    for row in rows:
        mark = "!" if row.problem else " "
        lines.append(f"{mark} {row.what:{widths[0]}}  {row.where:{widths[1]}}  {row.found}")
        if row.problem:
            lines.append(f"  {'':{widths[0]}}  {'':{widths[1]}}  -> {row.problem}")
    bad = sum(bool(row.problem) for row in rows)
    lines += ["", f"{len(rows) - bad} of {len(rows)} checks are well ({log.duration(result.seconds)})"]
    return "\n".join(lines)
