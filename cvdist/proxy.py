"""Excludes hosts from the proxy that the environment names (`http_proxy` and the like)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

import psutil


def ask_directly(hosts: Iterable[str] = ()) -> dict[str, str]:
    """Let this process and its children send requests to this machine and to `hosts` without the proxy.

    The hosts are added to `no_proxy`. Everything else, such as the storage and MLflow, keeps the proxy.

    Returns:
        The environment variables that were set, with their values; empty where there is no proxy.
    """
    names = ("no_proxy", "NO_PROXY")  # libraries read either of them
    present = {host.strip(): None for name in names for host in os.environ.get(name, "").split(",") if host}
    if "*" in present or not any(name.lower().endswith("_proxy") for name in os.environ):
        return {}
    inet = (socket.AF_INET, socket.AF_INET6)
    addresses = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family in inet]
    own = ["localhost", socket.gethostname(), *(address for address in addresses if "%" not in address)]
    variables = dict.fromkeys(names, ",".join(dict.fromkeys((*present, *own, *hosts))))
    os.environ.update(variables)
    return variables
