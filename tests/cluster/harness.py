"""A Ray cluster of several machines on one: each node in a network, mount, host name and process namespace.

Killing a node's one launcher process is a power cut; taking its link down is a cut cable. Storage and MLflow
run outside, on the bridge that joins the nodes. All addresses are private ones on that bridge; nothing of a
node can be reached from elsewhere, and nothing is left when the cluster is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.conftest import S3Server, answers, free_port, wait_until
from tests.jobs import ROOT, run

BIN = Path(sys.executable).parent
# Ray notices a dead node after about five seconds instead of half a minute.
DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not a node's
}


DISK = "200m"


def reason_to_skip() -> str:
    """Why this machine can't hold such a cluster; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    lacking = [tool for tool in ("ip", "tc", "unshare", "mount", "setpriv") if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    probe = f"cvprobe{os.getpid() % 100000}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"can't make network namespaces: {made.stderr.strip()}"


def ip(*words: str) -> str:
    """`ip WORDS`, which must succeed."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30).stdout


# Whatever is started here dies with the process that has started it, also by SIGKILL.
MORTAL = ("setpriv", "--pdeathsig", "KILL")


def sweep() -> None:
    """Remove namespaces and links that tests have left whose process is gone."""
    listed = ip("netns", "list") + ip("-o", "link", "show")
    for tag, pid in set(re.findall(r"\b(cv(\d+))(?=[nv]\d|br\b)", listed)):
        if Path(f"/proc/{pid}").exists():
            continue
        for name in set(re.findall(rf"\b{tag}n\d+\b", listed)):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        for name in set(re.findall(rf"\b{tag}(?:v\d+|br)\b", listed)):
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)


class Node:
    """A machine: `ray start --block` in its own namespaces."""

    def __init__(self, cluster: Cluster, number: int, cpus: int) -> None:
        """Start it; `number` is the last byte of its address, 2 for the head."""
        self.cluster, self.address = cluster, f"{cluster.subnet}.{number}"
        self.namespace = f"{cluster.tag}n{number}"
        self.link = f"{cluster.tag}v{number}"
        self.folder = cluster.folder / f"node-{number}"
        (self.folder / "ray").mkdir(parents=True)
        # The head's disk is small, so that it can be filled.
        disk = f"-t tmpfs -o size={DISK} tmpfs" if number == 2 else f"--bind {self.folder}/ray"
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self.link, "master", cluster.bridge, "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        head = f"{cluster.subnet}.2:6379"
        how = (
            ["--head", "--port=6379", f"--dashboard-host={self.address}", "--dashboard-port=8265"]
            if number == 2
            else [f"--address={head}"]
        )
        ray = [
            *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"),
            *("--object-store-memory=100000000", f"--node-ip-address={self.address}", *how),
        ]
        inside = (
            f"mount -t tmpfs -o size=512m tmpfs /dev/shm && mount {disk} /tmp/ray && "
            f"hostname node-{number} && exec {' '.join(ray)}"
        )
        with (self.folder / "log").open("w") as log:
            self.launcher = subprocess.Popen(
                [
                    *(*MORTAL, "ip", "netns", "exec", self.namespace),
                    *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("bash", "-c", inside),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=cluster.node_environment,
            )

    def power_off(self) -> None:
        """All its processes are gone at once, without a word to anybody."""
        self.launcher.kill()
        self.launcher.wait(30)

    def cut_cable(self) -> None:
        """It goes on running, and nobody hears of it."""
        ip("link", "set", self.link, "down")

    def mend_cable(self) -> None:
        """The inverse of `cut_cable`."""
        ip("link", "set", self.link, "up")

    def limit_rate(self, rate: str = "") -> None:
        """Its link carries at most `rate`, e.g. `8mbit`, in both directions; empty: as much as it can."""
        shape = ("tbf", "rate", rate, "burst", "32kbit", "latency", "400ms") if rate else ()
        for enter, link in (((), self.link), (("ip", "netns", "exec", self.namespace), "eth0")):
            words = (*enter, "tc", "qdisc", "replace" if rate else "delete", "dev", link, "root", *shape)
            subprocess.run(words, capture_output=True, check=True, timeout=30)

    def file(self, path: str) -> Path:
        """A file of the node, as this machine reaches it."""
        return Path(f"/proc/{self.launcher.pid}/root{path}")

    def fill_disk(self) -> None:
        """Not a byte more fits on it, until `free_disk`."""
        with self.file("/tmp/ray/filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass

    def free_disk(self) -> None:
        """The inverse of `fill_disk`."""
        self.file("/tmp/ray/filler").unlink()

    def set_clock(self, seconds: int) -> None:
        """Set the clock of its Python processes forward by `seconds`, from the true time (`clock/`)."""
        self.file("/tmp/ray/clock").write_text(str(seconds))

    def workers(self) -> dict[int, str]:
        """Process ids (of this machine) and command lines of its Ray Train workers."""
        return self.processes("RayTrainWorker")

    def processes(self, actor: str) -> dict[int, str]:
        """The same of the processes of one kind of Ray actors."""
        inside = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        ).stdout.split()
        found = {}
        for pid in inside:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words.startswith("ray::") and actor in words:
                    found[int(pid)] = words
        return found

    def close(self) -> None:
        """Remove all of it."""
        if self.launcher.poll() is None:
            self.power_off()
        for words in (("link", "delete", self.link), ("netns", "delete", self.namespace)):
            subprocess.run(["ip", *words], capture_output=True, check=False, timeout=30)


class FaultProxy:
    """Stands between the nodes and the S3 server; can answer 503 SlowDown in its place."""

    def __init__(self, host: str, target: str) -> None:
        """Listen on `host`; `target` is `address:port`."""
        self.slow_down = False
        self.refused = 0
        self._open: set[socket.socket] = set()
        there, _, port = target.rpartition(":")
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if proxy.slow_down:
                    proxy._refuse(self.request)
                    return
                with contextlib.suppress(OSError), socket.create_connection((there, int(port)), 10) as server:
                    server.settimeout(None)
                    pair = {self.request, server}
                    proxy._open |= pair
                    back = threading.Thread(target=proxy._pipe, args=(server, self.request), daemon=True)
                    back.start()
                    proxy._pipe(self.request, server)
                    back.join(60)
                    proxy._open -= pair

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

        self._server = Server((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def begin_to_refuse(self) -> None:
        """Reset what is on its way, and answer 503 from now on."""
        self.slow_down = True
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _refuse(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.settimeout(5)
            while b"\r\n\r\n" not in client.recv(65536):
                pass
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            head = "HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.refused += 1

    @staticmethod
    def _pipe(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


class MlflowServer:
    """MLflow with an sqlite store; can be killed and started again on its port."""

    def __init__(self, folder: Path, host: str) -> None:
        """Keeps its files in `folder`."""
        self._folder, self._host, self._port = folder, host, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://{host}:{self._port}"

    def start(self) -> None:
        """Returns when it answers."""
        with (self._folder / "mlflow.log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(*MORTAL, str(BIN / "mlflow"), "server", "--host", self._host, "--port", str(self._port)),
                    *("--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"),
                    *("--artifacts-destination", str(self._folder / "artifacts")),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Without the processes for jobs that nobody here has.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        wait_until(lambda: answers(f"{self.uri}/health"), 120, "the MLflow server answers")

    def kill(self) -> None:
        """As a machine that loses power."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


class Cluster:
    """A head without CPUs of its own, nodes with one CPU each, a bucket, and an MLflow server."""

    def __init__(self, folder: Path) -> None:
        """Start everything but the nodes besides the head; `close` ends it, also after an error here."""
        self.folder = folder
        self.tag = f"cv{os.getpid() % 100000}"  # names of links have at most 15 letters
        self.bridge = f"{self.tag}br"
        self.nodes: list[Node] = []
        self._next = 3
        self._cleanup = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        sweep()
        taken = ip("-4", "-o", "addr", "show")
        self.subnet = next(
            subnet
            for subnet in (f"10.{a}.{os.getpid() % 250}" for a in range(200, 250))
            if f"{subnet}." not in taken
        )
        self.host = f"{self.subnet}.1"
        ip("link", "add", self.bridge, "type", "bridge")
        self._cleanup.callback(
            subprocess.run, ["ip", "link", "delete", self.bridge], capture_output=True, check=False
        )
        ip("addr", "add", f"{self.host}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        Path("/tmp/ray").mkdir(exist_ok=True)  # what a node's own folder is mounted on
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_ADDRESS": f"{self.subnet}.2:6379",
            "RAY_API_SERVER_ADDRESS": f"http://{self.subnet}.2:8265",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        self.node_environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_", "CVDIST_"))},
            **{k: v for k, v in self.environment.items() if k.startswith("RAY_AUTH")},
            **DETECTION,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "CVDIST_CACHE": "/tmp/ray/cache",
            "PYTHONPATH": str(Path(__file__).parent / "clock"),
            "CVDIST_TEST_CLOCK": "/tmp/ray/clock",
        }
        self.nodes.append(Node(self, 2, cpus=0))
        self.s3 = S3Server(self.folder / "s3", self.host)
        self._cleanup.callback(self.s3.stop, kill=True)
        self.s3.start()
        self.proxy = FaultProxy(self.host, self.s3.environment["AWS_ENDPOINT_URL"].rpartition("//")[2])
        self._cleanup.callback(self.proxy.close)
        self.mlflow = MlflowServer(self.folder, self.host)
        self._cleanup.callback(self.mlflow.kill)
        self.mlflow.start()
        wait_until(
            lambda: answers(f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/version"),
            120,
            "Ray's head answers",
        )

    def add_node(self) -> Node:
        """A node with one CPU; `ready` waits for it."""
        node = Node(self, self._next, cpus=1)
        self._next += 1
        self.nodes.append(node)
        return node

    def remove(self, node: Node) -> None:
        """Take a node away for good."""
        node.close()
        self.nodes.remove(node)

    def ready(self, nodes: int) -> None:
        """Wait until exactly `nodes` nodes besides the head belong to the cluster."""

        def alive() -> bool:
            try:
                listed = self.ask("/nodes?view=summary")["data"]["summary"]
            except requests.RequestException:
                return False
            return sum(item["raylet"].get("state") == "ALIVE" for item in listed) == nodes + 1

        wait_until(alive, 120, f"{nodes} nodes have joined")

    def submit(self, *arguments: str, **environment: str) -> Job:
        """`ray job submit --no-wait -- python jobs/train.py ARGUMENTS`, with checkpoints in the bucket."""
        variables = {
            **self.s3.environment,
            "AWS_ENDPOINT_URL": self.proxy.url,
            "MLFLOW_TRACKING_URI": self.mlflow.uri,
            "CVDIST_STORAGE": "s3://bucket/runs",
            "CVDIST_COMMIT": "abc123",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            **environment,
        }
        done = run(
            *(BIN / "ray", "job", "submit", "--no-wait", "--working-dir", "."),
            *("--runtime-env-json", json.dumps({"env_vars": variables})),
            *("--", "python", "jobs/train.py", *arguments),
            storage=self.folder,
            timeout=120,
            **self.environment,
        )
        found = re.search(r"Job '(\S+)' submitted", done.stdout)
        assert found, done.stdout + done.stderr
        return Job(self, found[1])

    def torchrun(self, *arguments: str, storage: Path) -> list[Launched]:
        """`torchrun --nnodes 2 jobs/train.py ARGUMENTS`: two nodes, a worker each, that share `storage`."""
        nodes = self.nodes[1:3]
        words = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={nodes[0].address}", "--master-port=29400"]
        started = []
        for rank, node in enumerate(nodes):
            log = storage / f"torchrun-{rank}-{secrets.token_hex(2)}.log"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [
                        *(*MORTAL, "ip", "netns", "exec", node.namespace, sys.executable),
                        *("-m", "torch.distributed.run", *words, f"--node-rank={rank}"),
                        *("jobs/train.py", *arguments),
                    ],
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={
                        **self.node_environment,
                        "CVDIST_STORAGE": str(storage),
                        "CVDIST_CACHE": str(storage / "cache"),
                        "MLFLOW_TRACKING_URI": self.mlflow.uri,
                    },
                )
            self._cleanup.callback(process.kill)
            started.append(Launched(process, log))
        return started

    def ask(self, path: str) -> dict:
        """The cluster's REST API."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        url = self.environment["RAY_API_SERVER_ADDRESS"] + path
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def close(self) -> None:
        """End everything, and remove all that was made for it."""
        for node in list(self.nodes):
            self.remove(node)
        self._cleanup.close()


@dataclass(frozen=True)
class Launched:
    """torchrun on one node, and the file of what it prints."""

    process: subprocess.Popen[bytes]
    log: Path


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        """`name`: its submission id."""
        self._cluster, self._name = cluster, name

    def log(self) -> str:
        """All that it has printed."""
        with contextlib.suppress(requests.RequestException):
            return self._cluster.ask(f"/api/jobs/{self._name}/logs")["logs"]
        return ""

    def wait_for(self, text: str, seconds: float = 150) -> None:
        """Until a regular expression is found in the log; fails at once if the job has ended without it."""
        self.wait(lambda: re.search(text, self.log()), f"its log has {text!r}", seconds)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 150) -> None:
        """Until `condition` is true; fails at once if the job has ended without that."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.status() in ("SUCCEEDED", "FAILED", "STOPPED")
            if condition():
                return
            assert not ended, f"the job has ended before {what}:\n{self.log()[-6000:]}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s until {what}:\n{self.log()[-6000:]}"
            time.sleep(0.3)

    def status(self) -> str:
        """`RUNNING`, `SUCCEEDED`, ..."""
        with contextlib.suppress(requests.RequestException):
            return self._cluster.ask(f"/api/jobs/{self._name}")["status"]
        return ""

    def end(self, status: str = "SUCCEEDED", seconds: float = 240) -> str:
        """Wait for the end; returns the log."""
        deadline = time.monotonic() + seconds
        while (now := self.status()) not in ("SUCCEEDED", "FAILED", "STOPPED"):
            assert time.monotonic() < deadline, f"still {now} after {seconds:g} s:\n{self.log()[-6000:]}"
            time.sleep(0.3)
        log = self.log()
        assert now == status, log[-8000:]
        return log
