"""What a worker process offers to the training loop, whichever runtime has started it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from cvdist.checkpoints.fence import FenceWatch
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.uploads import Uploads
from cvdist.config import CheckpointConfig, RuntimeConfig
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.consensus import StopConsensus
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import UserError

_AGREE_SECONDS = 2.0  # between two exchanges of stop requests


class Worker(RankInfo):
    """One process of a run: its rank, the run's checkpoints, and what the run is asked to do.

    Attributes:
        attempt: Which start of the job's workers this is, from 1.
    """

    def __init__(
        self,
        ranks: RankInfo,
        store: CheckpointStore,
        settings: CheckpointConfig | None = None,
        *,
        step_timeout: float = RuntimeConfig.step_timeout,
        poll: Callable[[], StopRequest] = lambda: StopRequest.NONE,
        min_interval: float = 0.0,
    ) -> None:
        """Join the other workers of the run, which create theirs at the same time.

        Args:
            ranks: Ranks of this process.
            store: Store of the run's checkpoints. Rank 0's has the fence of the attempt.
            settings: How checkpoints are stored.
            step_timeout: Seconds that one worker waits for the others before it fails.
            poll: Returns what this process alone is asked to do. Called on all workers after the same steps.
            min_interval: Seconds within which a checkpoint that is not the best so far is left out.
        """
        super().__init__(**vars(ranks))
        self._store = store
        self._settings = settings or CheckpointConfig()
        self._poll = poll
        self._min_interval = min_interval
        self._best, self._saved_at = float("-inf"), float("-inf")
        self._suffix, self.attempt = gather((store.suffix, store.fence.attempt[1] if store.fence else 1))[0]
        self._uploads = Uploads(self._settings.timeout)
        self._consensus = StopConsensus(_AGREE_SECONDS, step_timeout)
        self._watch = FenceWatch(store.fence) if store.fence is not None else None

    def checkpoints(self) -> Sequence[str]:
        """List the names of the run's checkpoints in the order to try them. All workers must call this.

        Raises:
            UserError: On all workers, if the storage can't be read.
        """
        with raise_on_all_ranks():
            names = [one.name for one in self._store.list()] if self.rank == 0 else []
        return gather(names)[0]

    @contextmanager
    def open_checkpoint(self, name: str) -> Iterator[Path]:
        """Yield a checkpoint as a local folder, which lacks files if the checkpoint is gone.

        All workers must call this. Those of a node read one copy.

        Raises:
            UserError: On all workers, if the storage can't be read.
        """
        with ExitStack() as stack:
            copy = ""
            with raise_on_all_ranks(self._settings.timeout):
                if self.local_rank == 0:
                    copy = str(stack.enter_context(self._store.open(name)))
            # Names of temporary folders are random: the one that is there is this node's.
            here = next((Path(path) for path in gather(copy) if path and Path(path).is_dir()), None)
            with raise_on_all_ranks(self._settings.timeout):
                if here is None:
                    here = stack.enter_context(self._store.open(name))
            yield here
            gather(None)  # nobody reads it any more

    def open_best_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Open the checkpoint with the highest score as a local folder, or None. Only rank 0 calls this.

        Raises:
            UserError: If the storage can't be read.
        """
        best = self._store.best()
        return self._store.open(best.name) if best is not None else nullcontext()

    def save_checkpoint(
        self,
        name: str,
        score: float,
        at: int,
        fill: Callable[[Path], None] | None,
        awaited: Sequence[str] = (),
    ) -> None:
        """Begin to store a checkpoint. All workers must call this.

        At most one checkpoint is being stored: this waits for the one before. The best `--keep-checkpoints` by
        score are kept, and the latest.

        Args:
            name: Name of the checkpoint.
            score: Score of the checkpoint, higher is better.
            at: Number of samples trained on so far.
            fill: Writes this worker's files into an empty local folder, perhaps later and in another thread;
                None on a worker that has none. Rank 0 always has some.
            awaited: Files that the other workers write. Without them the checkpoint is not complete.

        Raises:
            UserError: On all workers, if the one before could not be stored.
        """
        if self._min_interval and not gather(self._due(score))[0]:
            return
        timeout = self._settings.timeout
        with raise_on_all_ranks(timeout):
            self._uploads.wait()
            if fill is not None and self.rank == 0:
                self._uploads.start(lambda: self._store.add(name, score, at, fill, awaited, timeout))
            elif fill is not None:
                self._uploads.start(lambda: self._store.add_shard(name + self._suffix, fill))
            if not self._settings.asynchronous:
                self._uploads.wait()

    def wait_for_uploads(self) -> None:
        """Wait until what was saved is stored. All workers must call this.

        Raises:
            UserError: On all workers, if it could not be stored.
        """
        with raise_on_all_ranks(self._settings.timeout):
            self._uploads.wait()

    def finish(self) -> None:
        """Wait, after an error, for the checkpoint that is being stored, without the other workers."""
        with suppress(UserError):
            self._uploads.wait()

    def poll_stop_request(self) -> StopRequest:
        """Return what the run is asked to do, the same on all workers. All must call this after each step.

        Raises:
            Superseded: On all workers, if a newer job of this name has begun.
        """
        if not self._consensus.due():
            return StopRequest.NONE
        request = self._poll()
        if self._watch is not None and self._watch.superseded:
            request = StopRequest.ABORT
        return self._consensus.agree(request)

    def _due(self, score: float) -> bool:
        now = time.monotonic()
        if score <= self._best and now - self._saved_at < self._min_interval:
            return False
        self._best, self._saved_at = max(self._best, score), now
        return True
