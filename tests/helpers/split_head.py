"""Trains several configurations in groups of workers: torchrun tests/helpers/split_head.py GROUPS RESULTS."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints.fence import Fence
from cvdist.distributed.collectives import gather, raise_on_all_ranks
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.stop_request import StopRequest
from cvdist.errors import UserError
from cvdist.jobs.train import open_worker
from cvdist.runtime import processes
from cvdist.training.setup import build_run
from cvdist.training.train import train
from tests.helpers import runs


class Recorder(runs.Recorder):
    """Says whether the logged model is an ordinary one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[int]] = {}

    def log_model(self, model: torch.nn.Module, *_: Any, **__: Any) -> None:
        """See `Tracker`."""
        self.logged = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def train_case(ranks: RankInfo, changes: dict[str, Any]) -> dict[str, Any]:
    """One run, or the error that all workers end with."""
    config = configs.replace(recipes.find("dogs-cats-vgg16-features"), **changes)
    configs.check(config)
    recorder, found = Recorder(), {}
    try:
        job = None
        with raise_on_all_ranks():
            if ranks.rank == 0:
                job = Fence.claim_job(f"{config.run.storage}/{config.run.name}")
        job = gather(job)[0]
        with open_worker(config, job, None, ranks, lambda: StopRequest.NONE) as (worker, _):
            run = build_run(config, worker, recorder)
            found = {"mode": run.mode.name, "note": run.plan.note, "kept": run.mode.shards != {}}
            summary = train(run)
            found |= {"correct": summary.best.valid_correct, "total": summary.best.valid_total}
    except UserError as error:
        found["error"] = str(error)
    steps, epochs = ([values for _, values in some] for some in (recorder.steps, recorder.epochs))
    return {**found, "steps": steps, "epochs": epochs, "logged": recorder.logged}


def main(groups: Path, results: Path) -> None:
    """Train the cases of each group of workers in turn; rank 0 writes what came of each group."""
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), []
    first = configs.replace(recipes.find("dogs-cats-vgg16-features"), device="cpu")
    for group in json.loads(groups.read_text()):
        if rank >= group["workers"]:
            break
        # torchrun's own group comes first; the others are some of its workers, which meet at another port.
        if found:
            os.environ |= {"MASTER_PORT": str(group["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(group["workers"]))
        with processes.init_distributed(first.runtime) as ranks:
            found.append({name: train_case(ranks, changes) for name, changes in group["cases"].items()})
    if rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
