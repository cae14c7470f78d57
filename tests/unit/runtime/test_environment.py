"""What starts the workers of a training, and which hosts are asked without a proxy."""

from __future__ import annotations

import os
import socket
import urllib.request

import pytest

from cvdist import proxy
from cvdist.runtime.environment import choose_launcher
from tests.helpers.jobs import user_error

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Sets those that are given and no others."""
    for name in os.environ:
        if name.startswith(("SLURM", "OMPI", "PMI")) or name in TORCHRUN or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("launcher", "values", "chosen"),
    [
        ("auto", {}, "ray"),
        ("auto", TORCHRUN, "torchrun"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, "torchrun"),
        ("auto", {"MASTER_ADDR": "node", "MASTER_PORT": "1"}, "ray"),
        ("auto", {"WORLD_SIZE": "1"}, "ray"),
        ("auto", {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "ray"),
        ("torchrun", {}, "torchrun"),
        ("ray", {"WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, "ray"),
        ("inline", {"WORLD_SIZE": "2", "RANK": "0"}, "inline"),
    ],
)
def test_launcher(variables, launcher, values, chosen):
    variables(**values)
    assert choose_launcher(launcher) == chosen


def test_half_an_environment_of_torchrun_is_named(variables):
    variables(WORLD_SIZE="2", RANK="0")
    for launcher in ("auto", "torchrun"):
        line = user_error(choose_launcher, launcher)
        assert (
            "has RANK=0 and WORLD_SIZE=2, as in a worker of torchrun, but not MASTER_ADDR and MASTER_PORT"
            in line
        )
        assert "--runtime inline" in line


@pytest.mark.parametrize(("name", "by"), [("SLURM_STEP_NUM_TASKS", "Slurm"), ("OMPI_COMM_WORLD_SIZE", "MPI")])
def test_copies_that_others_start_are_named(variables, name, by):
    variables(**{name: "3"})
    assert user_error(choose_launcher, "auto").startswith(f"{by} has started 3 copies of this command ({name})")


def test_this_machine_and_the_named_hosts_pass_by_the_proxy(variables):
    proxy.ask_directly(["10.0.0.7"])
    assert "no_proxy" not in os.environ  # there is no proxy
    variables(http_proxy="http://office:3128", NO_PROXY="intra.net", no_proxy="")
    for hosts in ([], ["10.0.0.7"], ["10.0.0.7"]):
        proxy.ask_directly(hosts)
    for host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), "10.0.0.7", "intra.net"):
        assert urllib.request.proxy_bypass(host), host
    assert not urllib.request.proxy_bypass("s3.amazonaws.com")
    assert os.environ["no_proxy"].split(",").count("10.0.0.7") == 1
