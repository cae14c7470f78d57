"""Workers started by torchrun, or this process alone: no Ray needed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cvdist.config import TrainConfig, storage_root
from cvdist.errors import UserError
from cvdist.training.collectives import together


@dataclass
class ProcessWorker:
    """A process with its checkpoints in a folder (`cvdist.runtime.worker.Worker`)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: torch.device
    checkpoints: CheckpointFolder

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker.latest_checkpoint`."""
        yield self.checkpoints.latest()

    @contextmanager
    def best_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker.best_checkpoint`."""
        yield self.checkpoints.best()

    def report(self, name: str, score: float, folder: Path | None) -> None:
        """See `Worker.report`."""
        with together():
            if folder is not None:
                self.checkpoints.add(name, score, folder)


class CheckpointFolder:
    """The checkpoints of one run in `root`, and `index.json` that lists the complete ones, oldest first."""

    def __init__(self, root: Path, keep: int) -> None:
        """`keep`: how many of the best stay, besides the latest."""
        self.root, self.keep = root, keep

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        entries = self._entries()
        return self.root / entries[-1][0] if entries else None

    def best(self) -> Path | None:
        """The one with the highest score."""
        entries = self._entries()
        return self.root / max(entries, key=lambda entry: entry[1])[0] if entries else None

    def add(self, name: str, score: float, folder: Path) -> None:
        """Copy `folder` in as `name`, list it, then delete what is no longer to be kept.

        Raises:
            UserError: if the disk can't take it.
        """
        target = self.root / name
        arriving = self.root / f".{name}.{os.getpid()}"
        try:
            shutil.copytree(folder, arriving)
            if target.exists():
                shutil.rmtree(target)
            arriving.rename(target)
            entries = [entry for entry in self._entries() if entry[0] != name] + [(name, score)]
            kept = sorted(entries, key=lambda entry: entry[1])[-self.keep :] + entries[-1:]
            self._write([entry for entry in entries if entry in kept])
        except OSError as error:
            shutil.rmtree(arriving, ignore_errors=True)
            raise UserError(f"the checkpoint {target} could not be written: {error.strerror}") from error
        for entry in entries:
            if entry not in kept:
                shutil.rmtree(self.root / entry[0], ignore_errors=True)

    def _entries(self) -> list[tuple[str, float]]:
        try:
            listed = json.loads((self.root / "index.json").read_text())
        except FileNotFoundError:
            return []
        return [(str(name), float(score)) for name, score in listed]

    def _write(self, entries: list[tuple[str, float]]) -> None:
        new = self.root / ".index.json"
        new.write_text(json.dumps(entries))
        new.replace(self.root / "index.json")


@dataclass(frozen=True)
class Place:
    """This process's place among the workers."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    def worker(self, config: TrainConfig) -> ProcessWorker:
        """The worker of the run that `config` names.

        Raises:
            UserError: if the storage is not a folder.
        """
        root = storage_root(config)
        if "://" in root:
            raise UserError(
                f"--storage {root}: outside of Ray, the storage has to be a folder that all nodes share"
            )
        kept = CheckpointFolder(Path(root) / config.checkpoint.name, config.checkpoint.keep_checkpoints)
        return ProcessWorker(
            self.rank,
            self.world_size,
            self.local_rank,
            self.local_world_size,
            socket.gethostname(),
            self.device,
            kept,
        )


@contextmanager
def joined(config: TrainConfig) -> Iterator[Place]:
    """Take this process's place among the workers, and leave it in order at the end.

    Raises:
        UserError: if GPUs are asked for that are not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, on_node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _device(config, local_rank, on_node)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.runtime.collective_timeout),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield Place(rank, world_size, local_rank, on_node, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(config: TrainConfig, local_rank: int, needed: int) -> torch.device:
    have = torch.cuda.device_count()
    if config.runtime.device == "cuda" and have < needed:
        raise UserError(f"--device cuda: {needed} workers on this node, which has {have} GPUs")
    if config.runtime.device != "cpu" and have >= needed:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
