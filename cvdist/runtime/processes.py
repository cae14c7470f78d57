"""Workers started by torchrun, or this process alone: no Ray needed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pyarrow import fs as arrow
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cvdist import storage
from cvdist.checkpoints.fence import Fence, FenceWatch
from cvdist.checkpoints.format import META
from cvdist.checkpoints.uploads import Uploads
from cvdist.config import CheckpointConfig, RuntimeConfig, TrainConfig, storage_root
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.consensus import StopConsensus
from cvdist.distributed.worker import StopRequest
from cvdist.errors import UserError

_AGREE_SECONDS = 1.0


@dataclass
class ProcessWorker:
    """A process with its checkpoints in a folder (`cvdist.distributed.worker.Worker`)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: torch.device
    kept: CheckpointFolder
    settings: CheckpointConfig = field(default_factory=CheckpointConfig)
    leaving: Callable[[], bool] = lambda: False
    """Whether this process was told to end."""
    step_timeout: float = RuntimeConfig.step_timeout

    def __post_init__(self) -> None:
        """Nothing is on its way yet."""
        self._uploads = Uploads(self.settings.checkpoint_timeout)
        self._consensus = StopConsensus(_AGREE_SECONDS, self.step_timeout)
        self._watch = FenceWatch(self.kept.fence) if self.kept.fence is not None else None

    def checkpoints(self) -> Sequence[str]:
        """See `Worker.checkpoints`."""
        return self.kept.newest()

    @contextmanager
    def open_checkpoint(self, name: str) -> Iterator[Path]:
        """See `Worker.open_checkpoint`."""
        yield self.kept.root / name

    @contextmanager
    def open_best_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker.open_best_checkpoint`."""
        yield self.kept.best()

    def save_checkpoint(
        self,
        name: str,
        score: float,
        at: int,
        fill: Callable[[Path], None] | None,
        awaited: Sequence[str] = (),
    ) -> None:
        """See `Worker.save_checkpoint`."""
        suffix = gather(self.kept.suffix)[0] if awaited else ""
        timeout = self.settings.checkpoint_timeout
        with raise_on_all_ranks(timeout):
            if fill is not None:
                self._uploads.wait()
                if self.rank == 0:
                    self._uploads.start(lambda: self.kept.add(name, score, fill, awaited, timeout))
                else:
                    self._uploads.start(lambda: self.kept.add_part(name + suffix, fill))
                if not self.settings.async_checkpoints:
                    self._uploads.wait()

    def wait_for_uploads(self) -> None:
        """See `Worker.wait_for_uploads`."""
        with raise_on_all_ranks(self.settings.checkpoint_timeout):
            self._uploads.wait()

    def finish(self) -> None:
        """Let the checkpoint on its way arrive, without the other workers."""
        with suppress(UserError):
            self._uploads.wait()

    def poll_stop_request(self) -> StopRequest:
        """See `Worker.poll_stop_request`."""
        if not self._consensus.due():
            return StopRequest.NONE
        mine = StopRequest.EXIT if self.leaving() else StopRequest.NONE
        if self._watch is not None and self._watch.superseded:
            mine = StopRequest.ABORT
        return self._consensus.agree(mine)


class CheckpointFolder:
    """The checkpoints of one run in `root`, and `index.json` that lists the complete ones, oldest first."""

    def __init__(self, root: Path, keep: int, fence: Fence | None = None) -> None:
        """`keep`: how many of the best stay, besides the latest. fence: of the attempt that may add to them."""
        self.root, self.keep, self.fence = root, keep, fence

    def newest(self) -> list[str]:
        """Names of the checkpoints, the newest first."""
        return [name for name, _ in reversed(self._entries())]

    def best(self) -> Path | None:
        """The one with the highest score."""
        entries = self._entries()
        return self.root / max(entries, key=lambda entry: entry[1])[0] if entries else None

    @property
    def suffix(self) -> str:
        """What ends the names of this attempt's checkpoints."""
        return self.fence.suffix if self.fence is not None else ""

    def add(
        self,
        name: str,
        score: float,
        fill: Callable[[Path], None],
        awaited: Sequence[str] = (),
        timeout: float = CheckpointConfig.checkpoint_timeout,
    ) -> None:
        """Let `fill` write a checkpoint, list it, then delete what is no longer to be kept.

        awaited: files of other workers that belong to it, for `timeout` seconds.

        Raises:
            UserError: if the disk can't take it.
            Superseded: if a newer attempt has begun.
        """
        name += self.suffix
        target = self.root / name
        try:
            if awaited:
                self.add_part(name, fill, awaited, timeout)
            else:
                storage.publish(arrow.LocalFileSystem(), str(target), fill, last=META)
            with self.fence.held() if self.fence is not None else nullcontext():
                entries = [entry for entry in self._entries() if entry[0] != name] + [(name, score)]
                kept = sorted(entries, key=lambda entry: entry[1])[-self.keep :] + entries[-1:]
                self._write([entry for entry in entries if entry in kept])
        except OSError as error:
            raise UserError(f"the checkpoint {target} could not be written: {storage.reason(error)}") from error
        for entry in entries:
            if entry not in kept:
                shutil.rmtree(self.root / entry[0], ignore_errors=True)

    def add_part(
        self,
        name: str,
        fill: Callable[[Path], None],
        awaited: Sequence[str] = (),
        timeout: float = CheckpointConfig.checkpoint_timeout,
    ) -> None:
        """Let `fill` write this worker's files of a checkpoint.

        Raises:
            UserError: if the disk can't take it, or what is `awaited` does not come within `timeout` seconds.
        """
        target = self.root / name
        try:
            storage.publish_files(
                arrow.LocalFileSystem(), str(target), fill, awaited=awaited, last=META, timeout=timeout
            )
        except OSError as error:
            raise UserError(f"the checkpoint {target} could not be written: {storage.reason(error)}") from error

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
class RankInfo:
    """This process's place among the workers."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    def worker(self, config: TrainConfig, fence: Fence | None, leaving: Callable[[], bool]) -> ProcessWorker:
        """The worker of the run that `config` names; rank 0 holds its `fence`."""
        root = Path(storage_root(config)) / config.checkpoint.name
        kept = CheckpointFolder(root, config.checkpoint.keep_checkpoints, fence)
        return ProcessWorker(
            self.rank,
            self.world_size,
            self.local_rank,
            self.local_world_size,
            socket.gethostname(),
            self.device,
            kept,
            config.checkpoint,
            leaving,
            config.runtime.step_timeout,
        )


def require_folder(config: TrainConfig) -> None:
    """Refuse storage that is no folder.

    Raises:
        UserError: naming it.
    """
    root = storage_root(config)
    if "://" in root:
        raise UserError(
            f"--storage {root}: outside of Ray, the storage has to be a folder that all nodes share"
        )


@contextmanager
def init_distributed(config: TrainConfig) -> Iterator[RankInfo]:
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
        timeout = timedelta(seconds=config.runtime.collective_timeout)
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        require_same_devices(store, rank, world_size, device.type)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            store=PrefixStore("cvdist", store),
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield RankInfo(rank, world_size, local_rank, on_node, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def require_same_devices(store: Store, rank: int, world_size: int, kind: str) -> None:
    """Refuse a group of which some have GPUs: there is no way to exchange anything between them.

    Raises:
        UserError: on all workers.
    """
    store.set(f"device-{rank}", kind)
    kinds = [store.get(f"device-{other}").decode() for other in range(world_size)]
    if len(set(kinds)) > 1:
        counts = " and ".join(f"{count} on {name}" for name, count in Counter(kinds).items())
        raise UserError(
            f"the workers have different devices, {counts}: use nodes of one kind, or --device cpu",
            on_all_workers=True,
        )


def _device(config: TrainConfig, local_rank: int, needed: int) -> torch.device:
    have = torch.cuda.device_count()
    if config.runtime.device == "cuda" and have < needed:
        raise UserError(f"--device cuda: {needed} workers on this node, which has {have} GPUs")
    if config.runtime.device != "cpu" and have >= needed:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
