"""A Ray cluster of several nodes on one machine, each with its own network, mounts, host name and processes.

Killing a node's launcher process is a power cut; taking its link down is a cut cable. Storage and MLflow run
outside the nodes, on the bridge that joins them. All addresses are private ones on that bridge: a node can't be
reached from elsewhere, and nothing is left when the cluster is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from k8s.services import answers, free_port
from tests.helpers.jobs import run
from tests.helpers.network import DIE_WITH_PARENT, Network
from tests.helpers.servers import S3Server
from tests.helpers.waiting import wait_for_exit, wait_until

BIN = Path(sys.executable).parent
# Ray notices a dead node after about five seconds instead of half a minute.
FAST_DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not a node's
}
HEAD = 2
"""The number of the head, the last byte of its address; the other nodes follow."""
HEAD_DISK_SIZE = "200m"
MAX_STARTS = 3
"""How often Ray is started on a node: where it is slow to start, it gives up after 30 s that can't be set."""


class Node:
    """A machine of the cluster: `ray start --block` in its own namespaces."""

    def __init__(self, cluster: Cluster, number: int, cpus: int) -> None:
        """Start it.

        Args:
            cluster: It joins this cluster.
            number: The last byte of its address; `HEAD` for the head.
            cpus: How many CPUs Ray may give to workers there.
        """
        self.cluster, self.machine = cluster, cluster.network.add(number)
        self.address = self.machine.address
        self.name = f"node-{number}"
        self.folder = cluster.folder / self.name
        (self.folder / "ray").mkdir(parents=True)
        # The head's disk is small, so that it can be filled.
        disk = f"-t tmpfs -o size={HEAD_DISK_SIZE} tmpfs" if number == HEAD else f"--bind {self.folder}/ray"
        head = f"{cluster.network.address(HEAD)}:6379"
        how = (
            ["--head", "--port=6379", f"--dashboard-host={self.address}", "--dashboard-port=8265"]
            if number == HEAD
            else [f"--address={head}"]
        )
        ray = [
            *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"),
            *("--object-store-memory=100000000", f"--node-ip-address={self.address}", *how),
        ]
        self._command = (
            f"mount -t tmpfs -o size=512m tmpfs /dev/shm && mount {disk} /tmp/ray && "
            f"hostname {self.name} && exec {' '.join(ray)}"
        )
        self.starts = 0
        self.lost = False  # by a fault that was meant; such a node is not started again
        self.start()

    def start(self) -> None:
        """Start Ray on it, for the first time or once more after it has ended."""
        self.starts += 1
        with (self.folder / "log").open("a") as log:
            self.launcher = subprocess.Popen(
                self.machine.inside(
                    *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("bash", "-c", self._command),
                ),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.cluster.node_environment,
            )

    def log(self) -> str:
        """What `ray start` has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def power_off(self) -> None:
        """End all its processes at once; none of them can tell the others."""
        self.lost = True
        self.launcher.kill()
        wait_for_exit(self.launcher, f"the killed {self.name}")

    def cut_cable(self) -> None:
        """Cut it off from the network; its processes go on."""
        self.lost = True
        self.machine.cut_cable()

    def file(self, path: str) -> Path:
        """The path by which this process reaches the node's file `path`."""
        return Path(f"/proc/{self.launcher.pid}/root{path}")

    def fill_disk(self) -> None:
        """Fill its disk to the last byte."""
        with self.file("/tmp/ray/filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass

    def free_disk(self) -> None:
        """Undo `fill_disk`."""
        self.file("/tmp/ray/filler").unlink()

    def set_clock(self, seconds: int) -> None:
        """Set the clock of its Python processes `seconds` ahead of the true time (`clock/sitecustomize.py`)."""
        self.file("/tmp/ray/clock").write_text(str(seconds))

    def workers(self) -> dict[int, str]:
        """Its Ray Train workers: command lines by process id, as this machine counts processes."""
        return self.processes("RayTrainWorker")

    def processes(self, actor: str, program: str = "ray::") -> dict[int, str]:
        """Its processes with `actor` in the command line of a program that is called so: an actor of Ray's.

        Returns:
            Command lines by process id.
        """
        found = {}
        for pid in self.machine.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words.partition(" ")[0].rpartition("/")[2].startswith(program) and actor in words:
                    found[pid] = words
        return found

    def close(self) -> None:
        """End its processes, and remove its link and namespaces."""
        if self.launcher.poll() is None:
            self.power_off()
        self.machine.remove()


class FaultProxy:
    """Forwards the nodes' requests to the S3 server, or answers them with 503 SlowDown itself."""

    def __init__(self, host: str, target: str) -> None:
        """Listen on a free port of `host`, and forward to `target`, which is `address:port`."""
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
        """Reset the open connections, and answer 503 from now on, until `slow_down` is set to False."""
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
    """MLflow with an SQLite store; can be killed and started again on its port."""

    def __init__(self, folder: Path, host: str) -> None:
        """Keep its files in `folder`, and listen on a free port of `host`."""
        self._folder, self._host, self._port = folder, host, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://{host}:{self._port}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        log_file = self._folder / "mlflow.log"
        with log_file.open("a") as log:
            process = self._process = subprocess.Popen(
                [
                    *(
                        *DIE_WITH_PARENT,
                        str(BIN / "mlflow"),
                        "server",
                        "--host",
                        self._host,
                        "--port",
                        str(self._port),
                    ),
                    *("--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"),
                    *("--artifacts-destination", str(self._folder / "artifacts")),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Without the processes for jobs that nobody here has.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        wait_until(
            lambda: process.poll() is not None or answers(f"{self.uri}/health"),
            "the MLflow server answers",
            lambda: f"a log of {log_file.stat().st_size} bytes",
        )
        assert process.poll() is None, log_file.read_text(errors="replace")[-6000:]

    def kill(self) -> None:
        """End all its processes by SIGKILL."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            wait_for_exit(self._process, "the killed MLflow server")
            self._process = None


class Cluster:
    """A head that takes no work, nodes with one CPU each, a bucket, and an MLflow server."""

    def __init__(self, folder: Path, report: Callable[[str], None] = print) -> None:
        """Start all but the nodes besides the head. `close` ends it; an error here does so, too.

        Args:
            folder: Where all its files are kept; a short path, as Ray's sockets are there.
            report: Gets a line about each thing that the cluster has done unasked.
        """
        self.folder, self.report = folder, report
        self.nodes: list[Node] = []
        self._next = HEAD + 1
        self._head_was_up = False
        self._cleanup = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.network = Network(host=True)
        self._cleanup.callback(self.network.close)
        self.host = self.network.address(1)
        Path("/tmp/ray").mkdir(exist_ok=True)  # what a node's own folder is mounted on
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_ADDRESS": f"{self.network.address(HEAD)}:6379",
            "RAY_API_SERVER_ADDRESS": f"http://{self.network.address(HEAD)}:8265",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        self.node_environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_", "CVDIST_"))},
            **{k: v for k, v in self.environment.items() if k.startswith("RAY_AUTH")},
            **FAST_DETECTION,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": "/tmp/ray",  # the node's own folder, which goes with it
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "CVDIST_CACHE": "/tmp/ray/cache",
            "PYTHONPATH": str(Path(__file__).parent / "clock"),
            "CVDIST_TEST_CLOCK": "/tmp/ray/clock",
        }
        self.nodes.append(Node(self, HEAD, cpus=0))
        self.s3 = S3Server(self.folder / "s3", self.host)
        self._cleanup.callback(self.s3.stop, kill=True)
        self.s3.start()
        self.proxy = FaultProxy(self.host, self.s3.environment["AWS_ENDPOINT_URL"].rpartition("//")[2])
        self._cleanup.callback(self.proxy.close)
        self.mlflow = MlflowServer(self.folder, self.host)
        self._cleanup.callback(self.mlflow.kill)
        self.mlflow.start()
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/version"
        self._wait(lambda: answers(url), "Ray's head answers")
        self._head_was_up = True

    def add_node(self) -> Node:
        """Start another node, with one CPU; `ready` waits until it has joined."""
        node = Node(self, self._next, cpus=1)
        self._next += 1
        self.nodes.append(node)
        return node

    def remove(self, node: Node) -> None:
        """End a node, which won't come back."""
        node.close()
        self.nodes.remove(node)

    def restart_head(self) -> None:
        """Lose the head with all its processes; start another one of the same address, which knows nothing."""
        head = self.nodes[0]
        head.power_off()
        head.lost, self._head_was_up = False, False
        head.start()
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/version"
        self._wait(lambda: answers(url), "Ray's new head answers")
        self._head_was_up = True

    def ready(self, nodes: int) -> None:
        """Wait until exactly `nodes` nodes besides the head belong to the cluster."""
        self._wait(
            lambda: list(self.states().values()).count("ALIVE") == nodes + 1, f"{nodes} nodes have joined"
        )

    def states(self) -> dict[str, str]:
        """The state of each node by its address, as Ray says, e.g. `ALIVE`; empty if Ray does not answer."""
        states: dict[str, str] = {}
        with contextlib.suppress(requests.RequestException):
            for item in self._listed_nodes():
                address = item["nodeManagerAddress"]
                if states.get(address) != "ALIVE":  # a node that was started again is also listed as dead
                    states[address] = item["state"]
        return states

    def _listed_nodes(self) -> list[dict]:
        """What the head knows of each node, also of those that have just registered or are dead."""
        listed = [item["raylet"] for item in self.ask("/nodes?view=summary")["data"]["summary"]]
        return [item for item in listed if "nodeManagerAddress" in item]

    def restart_ended_nodes(self) -> None:
        """Start Ray again where it has ended by itself, as a supervisor does on a real cluster.

        On a busy machine it may give up while it starts, or be so slow to answer that the head gives it up.
        """
        for node in self.nodes:
            if node.launcher.poll() is None or node.lost:
                continue
            lines = node.log().strip().splitlines()[-30:]
            why = f"Ray has ended by itself on {node.name}, at its start {node.starts}"
            if node.starts == MAX_STARTS or (node is self.nodes[0] and self._head_was_up):
                raise RuntimeError("\n".join([f"{why}:", *lines]))
            self.report(f"{why}, and is started again; its last words: {lines[-1] if lines else 'none'}")
            node.start()

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        def seen() -> str:
            states = self.states()
            return ", ".join(
                f"{node.name} {states.get(node.address, 'not joined')} (start {node.starts}, "
                f"{len(node.log())} bytes of log)"
                for node in self.nodes
            )

        def holds() -> object:
            self.restart_ended_nodes()
            return condition()

        logs = lambda: "\n".join(f"{node.name}: {node.log()[-1500:]}" for node in self.nodes)  # noqa: E731
        wait_until(holds, what, seen, detail=logs)

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
            **self.environment,
        )
        found = re.search(r"Job '(\S+)' submitted", done.stdout)
        assert found, done.stdout + done.stderr
        return Job(self, found[1])

    def drain(self, node: Node, seconds: int) -> None:
        """Announce to Ray that `node` will be taken away in `seconds`, as a cloud does with a spot machine."""
        (identity,) = [
            item["nodeId"]
            for item in self._listed_nodes()
            if item["nodeManagerAddress"] == node.address and item["state"] == "ALIVE"
        ]
        done = run(
            *(BIN / "ray", "drain-node", "--address", self.environment["RAY_ADDRESS"], "--node-id", identity),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", str(seconds)),
            storage=self.folder,
            **self.environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, path: str) -> dict:
        """What Ray's REST API answers to a GET of `path`."""
        url = self.environment["RAY_API_SERVER_ADDRESS"] + path
        answer = requests.get(url, headers=self.authorization(), timeout=60)
        answer.raise_for_status()
        return answer.json()

    def authorization(self) -> dict[str, str]:
        """The header that lets a request to Ray's REST API in."""
        return {"Authorization": f"Bearer {Path(self.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"}

    def close(self) -> None:
        """End everything, and remove all that was made for it."""
        for node in list(self.nodes):
            self.remove(node)
        self._cleanup.close()


def last_position(log: str) -> str:
    """How far training has got according to a job's log, e.g. `epoch 3/14 step 20/63`; empty before that."""
    furthest, position = (0, 0.0), ""
    for epoch, epochs, step, steps in re.findall(r"epoch +(\d+)/(\d+)  (?:step (\d+)/(\d+)|train loss)", log):
        if (at := (int(epoch), float(step or "inf"))) > furthest:
            furthest, position = at, f"epoch {epoch}/{epochs} " + (f"step {step}/{steps}" if step else "done")
    return position


def seen_in(log: str) -> str:
    """What moves in a job's log while the job gets on.

    Its size would also grow with a line that is repeated for ever.
    """
    kinds = len({re.sub(r"\b[0-9a-f]{8,}\b|\d+", "", line) for line in log.splitlines()})
    restarts = len(re.findall(r"resuming   at epoch", log))
    return f"{last_position(log) or 'no step done'}, {restarts} restarts, {kinds} kinds of log lines"


@dataclass(frozen=True)
class LoggedProcess:
    """A training job that was started by a command here, and the file of what it prints."""

    process: subprocess.Popen[bytes]
    file: Path

    def log(self) -> str:
        """All that it has printed."""
        return self.file.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until a regular expression is found in the log; fail if the process ends without it."""

        def found() -> bool:
            ended = self.process.poll() is not None
            if re.search(text, self.log()):
                return True
            assert not ended, f"the process has ended before its log had {text!r}:\n{self.log()[-6000:]}"
            return False

        wait_until(
            found, f"the log has {text!r}", lambda: seen_in(self.log()), detail=lambda: self.log()[-6000:]
        )

    def end(self) -> int:
        """Wait for its end; returns its exit code."""
        return wait_for_exit(
            self.process, self.file.name, lambda: seen_in(self.log()), detail=lambda: self.log()[-6000:]
        )


class Job:
    """A job that was submitted to the cluster."""

    ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

    def __init__(self, cluster: Cluster, identity: str) -> None:
        """`identity`: its submission id."""
        self._cluster, self._identity = cluster, identity
        self._log = ""

    def log(self) -> str:
        """All that it has printed, or had when Ray last answered."""
        with contextlib.suppress(requests.RequestException):
            self._log = self._cluster.ask(f"/api/jobs/{self._identity}/logs")["logs"]
        return self._log

    def status(self) -> str:
        """`RUNNING`, `SUCCEEDED`, ...; empty if Ray does not answer."""
        with contextlib.suppress(requests.RequestException):
            return self._cluster.ask(f"/api/jobs/{self._identity}")["status"]
        return ""

    def seen(self) -> str:
        """The status and how far it has got, for waits to compare and for a person to read."""
        return f"{self.status() or 'no answer from Ray'}, {seen_in(self.log())}"

    def wait_for(self, text: str) -> None:
        """Wait until a regular expression is found in the log; fail if the job ends without it."""
        self.wait(lambda: re.search(text, self.log()), f"its log has {text!r}")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait until `condition` is true; fail if the job ends without that."""

        def holds() -> bool:
            ended = self.status() in self.ENDED
            if condition():
                return True
            assert not ended, f"the job has ended before {what}:\n{self._log[-6000:]}"
            self._cluster.restart_ended_nodes()
            return False

        wait_until(holds, what, self.seen, detail=lambda: self._log[-6000:], poll_seconds=0.5)

    def end(self, status: str = "SUCCEEDED") -> str:
        """Wait until it has ended with `status`; returns the log."""

        def ended() -> str:
            self._cluster.restart_ended_nodes()
            now = self.status()
            return now if now in self.ENDED else ""

        how = wait_until(ended, "the job ends", self.seen, detail=lambda: self._log[-6000:], poll_seconds=0.5)
        log = self.log()
        if how != status:
            reason = self._cluster.ask(f"/api/jobs/{self._identity}")["message"]
            raise AssertionError(f"the job has ended as {how}, not {status} ({reason}):\n{log[-8000:]}")
        return log

    def stop(self) -> None:
        """Have Ray stop it, and wait until it has."""
        url = f"{self._cluster.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{self._identity}/stop"
        requests.post(url, headers=self._cluster.authorization(), timeout=60).raise_for_status()
        wait_until(lambda: self.status() in self.ENDED, "the job is stopped", self.seen)
