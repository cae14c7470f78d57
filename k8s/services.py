"""Services of a cluster as local processes, for `stack.py`, tests and benchmarks."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from cvdist.errors import UserError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Return whether a server answers at `url`, even if only that it wants a token."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def beside_python(program: str) -> str:
    """Return the path of a program that is installed in the same environment as this Python.

    Raises:
        UserError: if it is not installed there.
    """
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        raise UserError(f"{program} is not installed beside {sys.executable}: start the stack by `make stack`")
    return str(path)


class SeaweedFS:
    """An S3 server with one bucket. It has to be started with `command`.

    Attributes:
        command: command that starts it in the foreground, with `keys` in its environment.
        keys: environment variables with the access key and the secret.
        environment: environment variables that make a process use it.
    """

    def __init__(
        self,
        folder: Path,
        bucket: str,
        access_key: str,
        secret: str,
        *,
        sockets: str,
        host: str = LOOPBACK,
        port: int = 0,
    ) -> None:
        """Choose the server's other ports.

        Args:
            folder: existing folder for its files and logs.
            bucket: name of the bucket.
            access_key: name of the key.
            secret: secret of the key.
            sockets: folder with a short path, for a socket that outlives the server.
            host: address that it listens on.
            port: port that it listens on; 0: any free one.
        """
        port = port or free_port()
        self.keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret}
        self.environment = {
            **self.keys,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_REGION": "us-east-1",
        }
        self.command = [
            *(beside_python("weed"), f"-logdir={folder}", "mini", f"-dir={folder}", f"-bucket={bucket}"),
            *(f"-ip={host}", f"-ip.bind={host}", f"-s3.port={port}", f"-s3.localSocket={sockets}/s3-{port}"),
            *(f"-{part}.port={free_port()}" for part in ("master", "volume", "filer", "admin")),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false"),
        ]
        self._bucket = bucket

    def has_bucket(self) -> bool:
        """Return whether the server answers and has its bucket."""
        from pyarrow import fs

        client = fs.S3FileSystem(
            access_key=self.keys["AWS_ACCESS_KEY_ID"],
            secret_key=self.keys["AWS_SECRET_ACCESS_KEY"],
            region=self.environment["AWS_REGION"],
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
            connect_timeout=2,
            request_timeout=5,
            retry_strategy=fs.AwsStandardS3RetryStrategy(1),
        )
        try:
            return bool(client.get_file_info(self._bucket).type == fs.FileType.Directory)
        except OSError:
            return False
