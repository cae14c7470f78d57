"""Simulates nodes on this machine by network namespaces that are connected by a switch; not a benchmark itself.

The switch has no address, so the namespaces and the outside can't reach each other.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_TAG = "cvb"  # and the process id: names of links have at most 15 letters
_MORTAL = ("setpriv", "--pdeathsig", "KILL")  # what is started ends with this process, whatever ends that


def reason_to_skip() -> str:
    """Return why this machine can't simulate nodes; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    lacking = [tool for tool in ("ip", "tc", "setpriv") if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    try:
        with Network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"can't make network namespaces: {error.stderr.strip()}"


class Network:
    """Nodes and their switch, as a context manager: they exist inside of the context."""

    def __init__(self, nodes: int) -> None:
        """Choose names for a network of `nodes` nodes. Nothing is created before the context is entered."""
        self._tag = f"{_TAG}{os.getpid() % 10_000_000}"
        self._bridge = f"{self._tag}br"
        self.nodes = range(nodes)

    def __enter__(self) -> Network:
        """Create the namespaces, the switch and the links.

        Raises:
            subprocess.CalledProcessError: if one can't be created; those that were created are removed.
        """
        _sweep()
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "link", "set", self._bridge, "up")
            for node in self.nodes:
                name, link = self._names(node)
                _run("ip", "netns", "add", name)
                _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
                _run("ip", "link", "set", link, "master", self._bridge, "up")
                _run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove namespaces, switch and links."""
        self.close()

    def close(self) -> None:
        """Remove those namespaces, links and switches that exist."""
        for node in self.nodes:
            name, link = self._names(node)
            for words in (("link", "delete", link), ("netns", "delete", name)):
                subprocess.run(["ip", *words], capture_output=True, check=False, timeout=30)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False, timeout=30)

    @staticmethod
    def address(node: int) -> str:
        """Return the IP address of a node's `eth0`."""
        return f"10.213.77.{node + 1}"

    def inside(self, node: int, *command: str) -> tuple[str, ...]:
        """Return the command that runs `command` on a node."""
        return (*_MORTAL, "ip", "netns", "exec", self._names(node)[0], *command)

    def limit(self, node: int, gbit: float) -> None:
        """Limit the rate at which a node sends and receives, in Gbit/s."""
        name, link = self._names(node)
        # The burst is more than the largest packet that a network card is handed at once, 64 KiB.
        how = ("root", "tbf", "rate", f"{gbit * 1000:.0f}mbit", "burst", "256kb", "latency", "50ms")
        _run("tc", "-n", name, "qdisc", "replace", "dev", "eth0", *how)
        _run("tc", "qdisc", "replace", "dev", link, *how)

    def _names(self, node: int) -> tuple[str, str]:
        return f"{self._tag}n{node}", f"{self._tag}v{node}"


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def _sweep() -> None:
    """Remove namespaces and links that killed processes have left behind."""
    listed = _run("ip", "netns", "list") + _run("ip", "-o", "link", "show")
    for tag, pid in set(re.findall(rf"\b({_TAG}(\d+))(?=[nv]\d|br\b)", listed)):
        if Path(f"/proc/{pid}").exists():
            continue
        for name in set(re.findall(rf"\b{tag}n\d+\b", listed)):
            with suppress(subprocess.SubprocessError):
                _run("ip", "netns", "delete", name)
        for name in set(re.findall(rf"\b{tag}(?:v\d+|br)\b", listed)):
            with suppress(subprocess.SubprocessError):
                _run("ip", "link", "delete", name)
