"""Find out what this process was started by, and whether Ray is installed, without importing it."""

from __future__ import annotations

import importlib.util
import os

from cvdist.config import Launcher
from cvdist.errors import UserError

# What torchrun tells each worker.
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How many copies of a command others have started.
_COPIES = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "MPI", "PMI_SIZE": "MPI"}


def choose_launcher(launcher: Launcher) -> Launcher:
    """Return what starts the workers of a training, where `auto` leaves that to the environment.

    Raises:
        UserError: if the environment looks like torchrun's but lacks something, or others start copies.
    """
    if launcher in ("ray", "inline"):
        return launcher
    found = {name: value for name in _TORCHRUN if (value := os.environ.get(name))}
    said = " and ".join(f"{name}={value}" for name, value in found.items())
    if "RANK" in found or found.get("WORLD_SIZE", "1") != "1":
        if len(found) < len(_TORCHRUN) and (found.get("RANK"), found.get("WORLD_SIZE")) != ("0", "1"):
            lacking = " and ".join(name for name in _TORCHRUN if name not in found)
            raise UserError(
                f"the environment has {said}, as in a worker of torchrun, but not {lacking}: start with "
                "torchrun, choose --runtime ray or --runtime inline, or unset what is there"
            )
        return "torchrun"
    for name, by in _COPIES.items() if launcher == "auto" else ():
        if os.environ.get(name, "1") not in ("0", "1"):
            raise UserError(
                f"{by} has started {os.environ[name]} copies of this command ({name}), and each would be a job "
                "of its own: start one, or torchrun in each, or choose --runtime ray or --runtime inline"
            )
    return "torchrun" if launcher == "torchrun" else "ray"


def require_ray(otherwise: str) -> None:
    """Refuse to go on without Ray; `otherwise` says what can be done instead.

    Raises:
        UserError: if Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"Ray is not installed: pip install 'ray[default,train,data]', or, without it, {otherwise}"
        )
