"""Machines simulated by network namespaces on one bridge, for tests of clusters and for benchmarks."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

# Begins the command of every process that is started there: it dies with its parent, also by SIGKILL.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_LETTERS = itertools.cycle(string.ascii_lowercase)  # for the networks of one process


def reason_to_skip() -> str:
    """Why this machine can't simulate others; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    lacking = [tool for tool in ("ip", "tc", "unshare", "mount", "setpriv") if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    try:
        with contextlib.closing(Network()) as network:
            network.add(2)
    except subprocess.CalledProcessError as error:
        return f"can't make network namespaces: {error.stderr.strip()}"
    return ""


def ip(*words: str) -> str:
    """Run `ip WORDS`, which must succeed, and return its output."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30).stdout


class Network:
    """A bridge with machines on it, which reach each other and nothing else. `close` removes all of it."""

    def __init__(self, *, host: bool = False) -> None:
        """Make the bridge. host: whether this machine is on it too, at `address(1)`."""
        _remove_leftovers()
        taken = ip("-4", "-o", "addr", "show")
        own = (f"10.{number}.{os.getpid() % 250}." for number in range(200, 250))
        self._subnet = next(subnet for subnet in own if subnet not in taken)
        self._tag = f"cv{os.getpid()}{next(_LETTERS)}"  # names of links have at most 15 letters
        self._machines: list[SimulatedMachine] = []
        self._bridge = f"{self._tag}br"
        try:
            ip("link", "add", self._bridge, "type", "bridge")
            if host:
                ip("addr", "add", f"{self.address(1)}/24", "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
        except BaseException:
            self.close()
            raise

    def address(self, number: int) -> str:
        """The IP address of a machine on this network."""
        return f"{self._subnet}{number}"

    def add(self, number: int) -> SimulatedMachine:
        """Add the machine with the address `address(number)`; its interface is named eth0."""
        machine = SimulatedMachine(f"{self._tag}n{number}", f"{self._tag}v{number}", self.address(number))
        self._machines.append(machine)
        ip("netns", "add", machine.namespace)
        ip("link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace)
        ip("link", "set", machine.link, "master", self._bridge, "up")
        ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        ip("-n", machine.namespace, "link", "set", "eth0", "up")
        ip("-n", machine.namespace, "link", "set", "lo", "up")
        return machine

    def close(self) -> None:
        """Remove the bridge and all machines on it."""
        for machine in self._machines:
            machine.remove()
        _remove("link", self._bridge)


class SimulatedMachine:
    """A network namespace, and the link that joins it to the bridge."""

    def __init__(self, namespace: str, link: str, address: str) -> None:
        """Note the names; `Network.add` makes what they name."""
        self.namespace, self.link, self.address = namespace, link, address

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command that runs `command` there; it ends with this process, whatever ends that."""
        return (*DIE_WITH_PARENT, "ip", "netns", "exec", self.namespace, *command)

    def cut_cable(self) -> None:
        """Cut it off from the network; its processes go on."""
        ip("link", "set", self.link, "down")

    def restore_cable(self) -> None:
        """Undo `cut_cable`."""
        ip("link", "set", self.link, "up")

    def limit_rate(self, rate: str = "") -> None:
        """Limit its link to `rate`, e.g. `8mbit`, in both directions; without a rate, lift the limit."""
        # The burst is more than the largest packet that a network card is handed at once, 64 KiB.
        shape = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms") if rate else ()
        for words in (("tc", "-n", self.namespace), ("tc",)):
            device = "eth0" if len(words) > 1 else self.link
            how = (*words, "qdisc", "replace" if rate else "delete", "dev", device, "root", *shape)
            subprocess.run(how, capture_output=True, check=True, timeout=30)

    def processes(self) -> list[int]:
        """Ids of its processes, as this machine counts them."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(word) for word in listed.stdout.split()]

    def remove(self) -> None:
        """Remove the namespace and the link, if they are there."""
        _remove("link", self.link)
        _remove("netns", self.namespace)


def _remove(kind: str, name: str) -> None:
    subprocess.run(["ip", kind, "delete", name], capture_output=True, check=False, timeout=30)


def _remove_leftovers() -> None:
    """Remove what processes that are gone have left."""
    listed = ip("netns", "list") + ip("-o", "link", "show")
    for tag, pid in set(re.findall(r"\b(cv(\d+)[a-z])(?=[nv]\d|br\b)", listed)):
        if Path(f"/proc/{pid}").exists():
            continue
        for name in set(re.findall(rf"\b{tag}n\d+\b", listed)):
            _remove("netns", name)
        for name in set(re.findall(rf"\b{tag}(?:v\d+|br)\b", listed)):
            _remove("link", name)
