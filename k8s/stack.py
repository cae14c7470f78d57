"""Runs the services of a cluster as local processes, on loopback: `python k8s/stack.py up`, `... down`.

They are SeaweedFS, the MLflow server on PostgreSQL (or SQLite), a Ray head without CPUs and Ray workers, with
the same settings as in the Kubernetes manifests. All state is in one folder: data, logs, secrets, and
`state.json`, which lists the stack's processes. No other processes are ever ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import tyro  # noqa: E402

from cvdist.config.bounds import Bounds, Count, at_least  # noqa: E402
from cvdist.config.settings import check_values  # noqa: E402
from cvdist.errors import UserError  # noqa: E402
from cvdist.jobs import cli  # noqa: E402
from k8s.services import LOOPBACK, SeaweedFS, answers, beside_python, free_port  # noqa: E402

logger = logging.getLogger("cvdist.stack")

BUCKET = "cvdist"
_STOP_TIMEOUT = 20.0  # seconds that a process may take to end before it is killed
_OBJECT_STORE = 200_000_000  # bytes of each Ray node


Port = Annotated[int, Bounds(0, 65535)]


@dataclass(frozen=True)
class Options:
    """The command line's options."""

    what: Annotated[Literal["up", "down"], tyro.conf.Positional]
    folder: Path = ROOT / "stack"
    """Folder for data, logs and state."""
    workers: Count = 2
    """Number of Ray workers."""
    cpus_per_worker: Count = 1
    """CPUs of each Ray worker."""
    s3_port: Port = 8333
    """Port of SeaweedFS. 0: any free one."""
    mlflow_port: Port = 5000
    """Port of MLflow. 0: any free one."""
    dashboard_port: Port = 8265
    """Port of Ray's dashboard. 0: any free one."""
    timeout: Annotated[float, at_least(1)] = 120.0
    """Seconds to wait for each service to start."""


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, and start or stop the stack."""
    about = (__doc__ or "").splitlines()[0]
    options = tyro.cli(Options, prog="stack.py", description=about, args=list(arguments))
    check_values(options)
    options = replace(options, folder=options.folder.absolute())
    if options.what == "down":
        down(options.folder)
    else:
        up(options)


def up(options: Options) -> None:
    """Start all services, and return when they answer.

    Raises:
        UserError: if a port is taken or a service does not start in time. Services that run already are ended.
    """
    stack = Stack(options)
    try:
        s3 = stack.start_s3()
        mlflow = stack.start_mlflow(s3)
        inside = {**s3, "MLFLOW_TRACKING_URI": mlflow, "CVDIST_STORAGE": f"s3://{BUCKET}/runs"}
        ray = stack.start_ray(inside)
    except BaseException:
        down(options.folder)
        raise
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in {**inside, **ray}.items()]
    _write_private(options.folder / "env", "".join(exports))
    here = os.path.relpath(options.folder / "env")
    print(
        f"MLflow       {mlflow}\n"
        f"Ray          {ray['RAY_API_SERVER_ADDRESS']}, {options.workers} workers\n"
        f"bucket       s3://{BUCKET} at {s3['AWS_ENDPOINT_URL']}\n"
        f"logs         {os.path.relpath(options.folder / 'logs')}\n\n"
        f"next: . {here if here.startswith('.') else './' + here}\n"
        f"      ray job submit --working-dir . -- "
        f"python jobs/train.py digits-cnn --num-workers {options.workers}\n"
        f"      make stack-down"
    )


def down(folder: Path) -> None:
    """End the processes of the stack in `folder`, in reverse order of their start. Its data is kept."""
    path = folder / "state.json"
    try:
        processes = json.loads(path.read_text())
    except FileNotFoundError:
        logger.info("no stack is running in %s", folder)
        return
    for entry in reversed(processes):
        if (process := _alive(entry)) is not None:
            _end(process)
            logger.info("ended %s", entry["name"])
    for entry in processes:
        if entry.get("temporary"):
            shutil.rmtree(entry["temporary"], ignore_errors=True)
    path.unlink()


class Stack:
    """Starts the services one by one, and records their processes in `state.json`."""

    def __init__(self, options: Options) -> None:
        """Make the stack's folder with new secrets.

        Raises:
            UserError: if a stack is running in the folder already.
        """
        self._options = options
        self._folder = options.folder
        state = self._folder / "state.json"
        if state.exists() and any(_alive(entry) for entry in json.loads(state.read_text())):
            raise UserError(f"a stack is running in {self._folder}: make stack-down ends it")
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        self._started: list[dict[str, object]] = []
        self._secrets = self._folder / "secrets.json"
        if not self._secrets.exists():
            made = {name: secrets.token_hex(24) for name in ("bucket", "postgres", "ray")}
            _write_private(self._secrets, json.dumps(made))

    def start_s3(self) -> dict[str, str]:
        """Start SeaweedFS with the bucket, and return the environment variables that clients need."""
        port = _port(self._options.s3_port, "--s3-port")
        data = self._folder / "bucket"
        data.mkdir(exist_ok=True)
        temporary = tempfile.mkdtemp(prefix="stack-")  # the path of a socket has to be short
        server = SeaweedFS(data, BUCKET, "stack", self._secret("bucket"), sockets=temporary, port=port)
        self._start("seaweedfs", server.command, server.keys, temporary=temporary)
        self._wait("seaweedfs", server.has_bucket, "the bucket is there")
        return server.environment

    def start_mlflow(self, s3: dict[str, str]) -> str:
        """Start the MLflow server, on PostgreSQL if possible, else on SQLite, and return its address."""
        port = _port(self._options.mlflow_port, "--mlflow-port")
        bin_folder = ROOT / ".venv-mlflow" / "bin"
        if not (bin_folder / "mlflow").exists():
            bin_folder = Path(sys.executable).parent
        python = bin_folder / "python"
        if _imports(python, "psycopg2"):
            database, environment = self._start_database()
        else:
            database, environment = self._sqlite("psycopg2 is not installed beside MLflow")
        if _imports(python, "boto3"):
            artifacts = f"s3://{BUCKET}/mlflow"
            logger.info("artifacts  %s", artifacts)
        else:
            artifacts = str(self._folder / "artifacts")
            logger.info("artifacts  %s: boto3 is not installed beside MLflow", artifacts)
        command = [str(bin_folder / "mlflow"), "server", f"--host={LOOPBACK}", f"--port={port}", "--workers=1"]
        command += ["--serve-artifacts", f"--artifacts-destination={artifacts}"]
        # In the environment, not among the arguments, as in the manifests.
        self._start(
            "mlflow",
            command,
            {
                **s3,
                **environment,
                "MLFLOW_BACKEND_STORE_URI": database,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for jobs that nobody submits
            },
        )
        address = f"http://{LOOPBACK}:{port}"
        self._wait("mlflow", lambda: answers(f"{address}/health"), "MLflow answers")
        return address

    def start_ray(self, environment: dict[str, str]) -> dict[str, str]:
        """Start a Ray head without CPUs, and the workers.

        Returns:
            The environment variables that `ray job submit` needs.
        """
        dashboard = _port(self._options.dashboard_port, "--dashboard-port")
        gcs = free_port()
        token = self._folder / "ray-token"
        _write_private(token, self._secret("ray"))
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        inside = {
            **environment,
            **access,
            "CVDIST_CACHE": str(self._folder / "cache"),
            # Jobs say `python` and mean the one that runs this.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # When the stack ends, so does the work on it: not a drain of 30 seconds first.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        # Ray's sockets are in it, whose paths can't be longer than 107 characters.
        temporary = tempfile.mkdtemp(prefix="stack-")
        self._start(
            "ray-head",
            [
                *(beside_python("ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={gcs}"),
                *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}"),
                *(f"--ray-client-server-port={free_port()}", *_ports_of_a_node(LOOPBACK)),
            ],
            inside,
            temporary=temporary,
        )
        address = f"http://{LOOPBACK}:{dashboard}"
        self._wait("ray-head", lambda: answers(f"{address}/api/version"), "Ray's dashboard answers")
        for number in range(1, self._options.workers + 1):
            self._start(
                f"ray-worker-{number}",
                [
                    *(beside_python("ray"), "start", "--block", f"--address={LOOPBACK}:{gcs}"),
                    *(f"--num-cpus={self._options.cpus_per_worker}", *_ports_of_a_node(_own_host(number))),
                ],
                inside,
            )
            # One after the other: Ray nodes of one address that start together wait for each other without end.
            self._wait(
                f"ray-worker-{number}",
                lambda nodes=number + 1: _nodes(address, self._secret("ray")) == nodes,  # type: ignore[misc]
                "Ray has it among its nodes",
            )
        return {"RAY_API_SERVER_ADDRESS": address, **access}

    def _start_database(self) -> tuple[str, dict[str, str]]:
        """Start PostgreSQL if it is installed and can run here, else choose SQLite.

        Returns:
            The database's URI, and the environment variables that MLflow needs to connect to it.
        """
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        folder = installed[-1] if installed else Path(shutil.which("initdb") or "/none/initdb").parent
        if not (folder / "initdb").exists():
            return self._sqlite("PostgreSQL is not installed")
        user = None
        if os.geteuid() == 0:  # as root it refuses to run
            known = {entry.pw_name for entry in pwd.getpwall()}
            user = next((name for name in ("postgres", "nobody") if name in known), None)
            if user is None:
                return self._sqlite("PostgreSQL does not run as root, and there is no user postgres or nobody")
        data = self._folder / "postgres"
        data.mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            shutil.chown(data, user)
        if _run_as(user, ["test", "-w", str(data)]).returncode:
            return self._sqlite(f"PostgreSQL, as {user}, can't reach {data}")
        if not (data / "PG_VERSION").exists():
            # Readable by its owner alone.
            with tempfile.NamedTemporaryFile("w", prefix="password-") as password:
                password.write(self._secret("postgres"))
                password.flush()
                if user is not None:
                    shutil.chown(password.name, user)
                command = [str(folder / "initdb"), "-D", str(data), "-U", "mlflow", f"--pwfile={password.name}"]
                made = _run_as(user, [*command, "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"])
            if made.returncode:
                raise UserError(f"initdb: {made.stderr.strip()[-300:]}")
        port = free_port()
        self._start(
            "postgres",
            [
                *(str(folder / "postgres"), "-D", str(data), "-p", str(port)),
                *("-c", f"listen_addresses={LOOPBACK}", "-c", "unix_socket_directories="),
            ],
            {},
            user=user,
        )
        ready = [str(folder / "pg_isready"), "-q", "-h", LOOPBACK, "-p", str(port)]
        self._wait("postgres", lambda: not subprocess.run(ready, check=False).returncode, "PostgreSQL answers")
        logger.info("database   PostgreSQL %s", folder.parent.name)
        # The database `postgres` is there from the beginning, and nobody else uses this server.
        environment = {"PGHOST": LOOPBACK, "PGPORT": str(port), "PGPASSWORD": self._secret("postgres")}
        return "postgresql+psycopg2://mlflow@/postgres", environment

    def _sqlite(self, why: str) -> tuple[str, dict[str, str]]:
        logger.info("database   sqlite: %s", why)
        return f"sqlite:///{self._folder}/mlflow.db", {}

    def _secret(self, name: str) -> str:
        return str(json.loads(self._secrets.read_text())[name])

    def _start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        *,
        user: str | None = None,
        temporary: str = "",
    ) -> None:
        log = self._folder / "logs" / name
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("RAY_", "MLFLOW_", "PG", "AWS_", "CVDIST_"))
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=inherited | environment,
                cwd=self._folder if user is None else "/",
                start_new_session=True,  # outlives this process, and has a group of its own
                **_as(user),
            )
        started = psutil.Process(process.pid).create_time()
        self._started.append({"name": name, "pid": process.pid, "started": started, "temporary": temporary})
        _write_private(self._folder / "state.json", json.dumps(self._started, indent=1))

    def _wait(self, name: str, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` is true.

        Args:
            name: name of the service.
            condition: checked about five times a second.
            what: the condition in words.

        Raises:
            UserError: if the timeout is over or the process has ended; with the last line of its log.
        """
        (entry,) = [entry for entry in self._started if entry["name"] == name]
        deadline = time.monotonic() + self._options.timeout
        while not condition():
            ended = _alive(entry) is None
            if ended or time.monotonic() > deadline:
                why = "it has ended" if ended else f"not within {self._options.timeout:g} s (--timeout)"
                log = self._folder / "logs" / name
                last = next(
                    (line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()),
                    "",
                )
                raise UserError(f"{name}: timed out waiting until {what}: {why}; {log} ends with: {last[:300]}")
            time.sleep(0.2)


# -------------------------------------------------------------------------------------------------- processes


def _alive(entry: dict[str, object]) -> psutil.Process | None:
    """Return the process of an entry of `state.json`, or None if it has ended."""
    try:
        process = psutil.Process(int(str(entry["pid"])))
        mine = abs(process.create_time() - float(str(entry["started"]))) < 1.0
        return process if mine and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _end(process: psutil.Process) -> None:
    """End a process and its descendants: first by a signal, then by SIGKILL what is left after a while."""
    family = [process]
    with contextlib.suppress(psutil.Error):
        family += process.children(recursive=True)
    with contextlib.suppress(psutil.Error):
        # PostgreSQL's fast shutdown is SIGINT: SIGTERM waits until MLflow's connections are closed.
        process.send_signal(signal.SIGINT if process.name() == "postgres" else signal.SIGTERM)
    _, left = psutil.wait_procs([process], timeout=_STOP_TIMEOUT)
    _, left = psutil.wait_procs([p for p in family if p.is_running()], timeout=2 if not left else 0)
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, timeout=5)


def _run_as(user: str | None, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd="/",
        **_as(user),
    )


def _as(user: str | None) -> dict[str, Any]:
    """Return the arguments that start a process as another user, with that user's group alone."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def _imports(python: Path, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([str(python), "-c", code], check=False).returncode == 0


def _write_private(path: Path, content: str) -> None:
    """Write a file that only its owner can read, at any time."""
    arriving = path.with_name(f".{path.name}.{os.getpid()}")
    arriving.unlink(missing_ok=True)
    with os.fdopen(os.open(arriving, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    arriving.replace(path)


# ---------------------------------------------------------------------------------------------------- network


def _port(wanted: int, flag: str) -> int:
    if wanted == 0:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError:
            raise UserError(f"port {wanted} is taken: {flag} names another one, 0 any free one") from None
    return wanted


def _own_host(number: int) -> str:
    """Return a loopback address for a worker; on Linux each has its own, so Ray Train sees several nodes."""
    return f"127.0.0.{number + 1}" if sys.platform == "linux" else LOOPBACK


def _ports_of_a_node(host: str) -> Iterator[str]:
    """Yield the flags of `ray start` that let several Ray nodes share one machine without port collisions."""
    yield f"--node-ip-address={host}"
    yield f"--object-store-memory={_OBJECT_STORE}"
    for name in ("dashboard-agent-listen", "metrics-export"):
        yield f"--{name}-port={free_port()}"
    # Any free ones: not each node from the same range.
    yield from ("--min-worker-port=0", "--max-worker-port=0")


def _nodes(address: str, token: str) -> int:
    """Return how many nodes of the Ray cluster are alive."""
    request = urllib.request.Request(
        f"{address}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            summary = json.load(answer)["data"]["summary"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)


if __name__ == "__main__":
    sys.exit(cli.main(main))
