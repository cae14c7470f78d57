"""Files by path or URI (`/folder`, `file://`, `s3://`, `gs://`), through pyarrow.

S3 takes its settings from the usual AWS variables: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile,
or the node's role), AWS_REGION, AWS_ENDPOINT_URL for other servers than Amazon's, AWS_MAX_ATTEMPTS.
`s3://anonymous@bucket` reads a public bucket without credentials.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs as arrow

from cvdist import slow_requests
from cvdist.errors import UserError
from cvdist.log import redact

_CONNECT_TIMEOUT = 10.0  # seconds
_REQUEST_TIMEOUT = 60.0  # seconds without a byte
_ATTEMPTS = 4  # of one request, with back-off in between
_AWAIT_SECONDS = 0.2  # between two looks for another worker's file
_PATIENT_ATTEMPTS = 10  # the same in the middle of a long job: about a minute


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder. path: below what was listed; size: in bytes; modified: ns since 1970, 0: unknown."""

    path: str
    is_folder: bool
    size: int
    modified: int


def locate(uri: str, flag: str = "--storage", *, patient: bool = False) -> tuple[arrow.FileSystem, str]:
    """The file system behind `uri`, and the path in it.

    flag: the setting that `uri` came from, for messages; patient: wait about a minute for a server that is away
    (AWS_MAX_ATTEMPTS, if set, decides instead).

    Raises:
        UserError: if the URI can't be understood.
    """
    if "://" not in uri:
        return arrow.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        if uri.startswith("s3://"):
            return _s3(uri, _PATIENT_ATTEMPTS if patient else _ATTEMPTS)
        if uri.startswith("gs://"):
            return _gcs(uri)
        filesystem, path = arrow.FileSystem.from_uri(uri)
    except Exception as error:  # arrow raises its own kinds for schemes, buckets and credentials
        raise UserError(f"{flag} {redact(uri)}: {reason(error)}") from error
    return filesystem, path


def list_entries(uri: str, flag: str) -> Iterator[Entry]:
    """All that is below `uri`, in no order.

    Raises:
        UserError: if it is not there or can't be read.
    """
    filesystem, root = locate(uri, flag)
    try:
        for info in filesystem.get_file_info(arrow.FileSelector(root, recursive=True)):
            yield Entry(
                path=info.path[len(root) :].lstrip("/"),
                is_folder=info.type == arrow.FileType.Directory,
                size=info.size or 0,
                modified=info.mtime_ns or 0,
            )
    except OSError as error:
        raise _unreadable(uri, flag, error) from error


def read(filesystem: arrow.FileSystem, path: str) -> bytes:
    """A whole file.

    Raises:
        OSError: as the operating system or pyarrow words it.
    """
    if isinstance(filesystem, arrow.LocalFileSystem):
        return Path(path).read_bytes()
    with slow_requests.meter.request(path) as sizes:
        # Otherwise arrow would decompress what is named like a compressed file.
        with filesystem.open_input_stream(path, compression=None) as stream:
            content: bytes = stream.read()
        sizes.append(len(content))
        return content


def write(filesystem: arrow.FileSystem, path: str, content: bytes) -> None:
    """A file that is there whole or not at all; one that was there is replaced.

    Raises:
        OSError: as the operating system or pyarrow words it.
    """
    if not isinstance(filesystem, arrow.LocalFileSystem):
        # An object appears when its upload is complete.
        with (
            slow_requests.meter.request(path, len(content)),
            filesystem.open_output_stream(path, compression=None) as stream,
        ):
            stream.write(content)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    arriving = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with arriving.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine could leave the name without the content
        arriving.replace(target)
    finally:
        arriving.unlink(missing_ok=True)


def publish(
    filesystem: arrow.FileSystem,
    path: str,
    fill: Callable[[Path], None],
    *,
    last: str,
    ensure_current: Callable[[], None] = lambda: None,
) -> None:
    """A new folder of files, there whole or not at all; one that was there is replaced.

    fill: writes the files into an empty local folder. last: the file without which the others mean nothing.
    ensure_current: called before anything can be seen, and raises where this is no longer wanted.

    Raises:
        OSError: as the operating system or pyarrow words it.
    """
    if isinstance(filesystem, arrow.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        arriving = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            arriving.mkdir()
            fill(arriving)
            for file in arriving.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())  # or a crash of the machine could leave names without contents
            ensure_current()
            if target.exists():
                shutil.rmtree(target)
            arriving.rename(target)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
        return
    with TemporaryDirectory(prefix="cvdist-publish-") as private:
        fill(Path(private))
        ensure_current()
        for name in sorted((file.name for file in Path(private).iterdir()), key=lambda name: name == last):
            with slow_requests.meter.request(f"{path}/{name}", Path(private, name).stat().st_size):
                arrow.copy_files(
                    f"{private}/{name}",
                    f"{path}/{name}",
                    source_filesystem=arrow.LocalFileSystem(),
                    destination_filesystem=filesystem,
                )


def publish_files(
    filesystem: arrow.FileSystem,
    path: str,
    fill: Callable[[Path], None],
    *,
    awaited: Sequence[str],
    last: str,
    timeout: float,
    ensure_current: Callable[[], None] = lambda: None,
) -> None:
    """One worker's files of a new folder that several write at the same time.

    fill: writes this worker's files into an empty local folder. awaited: files that have to be there before
    `last`, if this worker has that one. ensure_current: see `publish`.

    Raises:
        OSError: as the operating system or pyarrow words it.
        UserError: if what is awaited does not come within `timeout` seconds.
    """
    local = isinstance(filesystem, arrow.LocalFileSystem)
    target = Path(path)
    if local:
        target.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that files can be moved into their place.
    with TemporaryDirectory(prefix=".arriving-", dir=target if local else None) as private:
        fill(Path(private))
        ensure_current()
        # What tells of other files follows them.
        order = {
            name: (name == last, name.endswith(".json"))
            for name in (file.name for file in Path(private).iterdir())
        }
        for name in sorted(order, key=lambda name: order[name]):
            if name == last:
                _await(filesystem, path, awaited, timeout)
                ensure_current()
            if local:
                with (Path(private) / name).open("rb") as opened:
                    os.fsync(opened.fileno())
                (Path(private) / name).replace(target / name)
            else:
                arrow.copy_files(
                    f"{private}/{name}",
                    f"{path}/{name}",
                    source_filesystem=arrow.LocalFileSystem(),
                    destination_filesystem=filesystem,
                )


def _await(filesystem: arrow.FileSystem, path: str, names: Sequence[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while names:
        found = filesystem.get_file_info([f"{path}/{name}" for name in names])
        missing = [info.base_name for info in found if info.type != arrow.FileType.File]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing[0]} of the checkpoint {path} has not come from its worker within {timeout:g} s "
                "(--checkpoint-timeout): is that worker's way to the storage slow or cut?"
            )
        time.sleep(_AWAIT_SECONDS)


@dataclass(frozen=True)
class Folder:
    """A folder or prefix whose files are named relative to it. Safe to use from several threads."""

    uri: str
    filesystem: arrow.FileSystem
    root: str
    flag: str

    @classmethod
    def open(cls, uri: str, flag: str, *, patient: bool = False) -> Folder:
        """See `locate`.

        Raises:
            UserError: if the URI can't be understood.
        """
        filesystem, root = locate(uri, flag, patient=patient)
        return cls(uri, filesystem, root, flag)

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            UserError: if it is not there or can't be read.
        """
        try:
            return read(self.filesystem, f"{self.root}/{name}")
        except OSError as error:
            raise _unreadable(f"{self.uri.rstrip('/')}/{name}", self.flag, error) from error

    def find(self, name: str) -> bytes | None:
        """A whole file, or None if there is none of this name.

        Raises:
            UserError: if it can't be read.
        """
        try:
            return read(self.filesystem, f"{self.root}/{name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(f"{self.uri.rstrip('/')}/{name}", self.flag, error) from error

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none of this name.

        Raises:
            UserError: if that can't be found out.
        """
        try:
            info = self.filesystem.get_file_info(f"{self.root}/{name}")
        except OSError as error:
            raise _unreadable(f"{self.uri.rstrip('/')}/{name}", self.flag, error) from error
        return info.size if info.type == arrow.FileType.File else None

    def write(self, name: str, content: bytes) -> None:
        """A file, whole or not at all.

        Raises:
            UserError: if it can't be written.
        """
        try:
            write(self.filesystem, f"{self.root}/{name}", content)
        except OSError as error:
            raise UserError(
                f"{self.flag} {redact(self.uri)}: {name} can't be written ({reason(error)})"
            ) from error

    def delete(self, name: str) -> None:
        """Delete a file.

        Raises:
            UserError: if that is not possible.
        """
        try:
            self.filesystem.delete_file(f"{self.root}/{name}")
        except OSError as error:
            raise UserError(
                f"{self.flag} {redact(self.uri)}: {name} can't be deleted ({reason(error)})"
            ) from error

    def sizes(self) -> dict[str, int]:
        """Names and sizes in bytes of all files below; empty if the folder is not there.

        Raises:
            UserError: if it can't be listed.
        """
        selector = arrow.FileSelector(self.root, recursive=True, allow_not_found=True)
        try:
            with slow_requests.meter.request(f"the list of {self.root}"):
                found = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise _unreadable(self.uri, self.flag, error) from error
        prefix = len(self.root) + 1
        return {info.path[prefix:]: info.size for info in found if info.type == arrow.FileType.File}


def file_state(uri: str, flag: str) -> Entry:
    """Size and time of one file, which tell whether it has changed.

    Raises:
        UserError: if it is not there or can't be read.
    """
    filesystem, path = locate(uri, flag)
    try:
        info = filesystem.get_file_info(path)
        if info.type != arrow.FileType.File:
            raise FileNotFoundError("there is no such file")
    except OSError as error:
        raise _unreadable(uri, flag, error) from error
    return Entry("", False, info.size, info.mtime_ns or 0)


def download(uri: str, target: Path, flag: str) -> None:
    """Copy one file to `target`, which is there whole or not at all.

    Raises:
        UserError: if it can't be read.
    """
    filesystem, path = locate(uri, flag)
    arriving = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        arrow.copy_files(
            path, str(arriving), source_filesystem=filesystem, destination_filesystem=arrow.LocalFileSystem()
        )
        arriving.replace(target)
    except OSError as error:
        raise _unreadable(uri, flag, error) from error
    finally:
        arriving.unlink(missing_ok=True)


def is_file(filesystem: arrow.FileSystem, path: str) -> bool:
    """Whether there is a file, rather than a folder or nothing; what can't be asked is none."""
    try:
        return bool(filesystem.get_file_info(path).type == arrow.FileType.File)
    except OSError:
        return False


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    filesystem, path = locate(uri)
    return filesystem.get_file_info(path).type != arrow.FileType.NotFound


def check_writable(uri: str, flag: str = "--storage") -> None:
    """Make the folder, write a small file into it and delete it. `flag`: where `uri` came from.

    Raises:
        UserError: if that is not possible, with the reason.
    """
    filesystem, path = locate(uri, flag)
    marker = f"{path}/.write-check-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if isinstance(filesystem, arrow.LocalFileSystem):
            filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(marker) as stream:
            stream.write(b"may be deleted")
        filesystem.delete_file(marker)
    except OSError as error:
        named = f"{flag} or CVDIST_STORAGE" if flag == "--storage" else flag
        raise UserError(
            f"the storage {redact(uri)} can't be written: {reason(error)}. Name another folder or URI with "
            f"{named}, or give this one the permission"
        ) from error


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A folder as a local one: itself if it is local, else a copy that lasts as long as the context.

    Raises:
        UserError: if it can't be read.
    """
    filesystem, path = locate(uri)
    if isinstance(filesystem, arrow.LocalFileSystem):
        yield Path(path)
        return
    with TemporaryDirectory(prefix="cvdist-copy-") as folder:
        try:
            arrow.copy_files(path, folder, source_filesystem=filesystem)
        except OSError as error:
            raise UserError(f"{redact(uri)} can't be read: {reason(error)}") from error
        yield Path(folder)


def reason(error: Exception) -> str:
    """What a person can use of an error: the operating system's words, or the library's first line."""
    number = getattr(error, "errno", None)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Arrow puts numbers of the operating system on errors that are not its own.
    if isinstance(number, int) and "AWS Error" not in text:
        return os.strerror(number)
    return re.sub(r"\s*\(Request ID.*?\)|, x-amz-\S+.*$", "", text)[:300]


def _unreadable(uri: str, flag: str, error: Exception) -> UserError:
    why = reason(error)
    hint = ""
    if re.search(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|InvalidAccessKeyId|HTTP response code 403", why):
        hint = ": check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
    elif re.search(r"NETWORK_CONNECTION|curlCode|resolve", why):
        hint = ": check AWS_ENDPOINT_URL and the network"
    elif isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in why:
        why, hint = "there is no such file, folder or bucket", ""
    return UserError(f"{flag} {redact(uri)} can't be read ({why}){hint}")


class PatientS3FileSystem(arrow.S3FileSystem):
    """S3 with bounds on every wait, and retries that it keeps when it is sent to another process."""

    def __init__(self, anonymous: bool, region: str, endpoint: str | None, attempts: int) -> None:
        """`attempts`: of one request, with pauses that grow in between."""
        self._settings = (anonymous, region, endpoint, attempts)
        super().__init__(
            anonymous=anonymous,
            region=region,
            endpoint_override=endpoint,
            connect_timeout=_CONNECT_TIMEOUT,
            request_timeout=_REQUEST_TIMEOUT,
            retry_strategy=arrow.AwsStandardS3RetryStrategy(attempts),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Without credentials: the other process has its own."""
        return PatientS3FileSystem, self._settings


def _s3(uri: str, attempts: int) -> tuple[arrow.FileSystem, str]:
    """As `FileSystem.from_uri`, with bounds on every wait."""
    parts = urlsplit(uri)
    if parts.query or parts.password or not parts.hostname:
        # Arrow's own options, or credentials, in the URI; and its words for one that is malformed.
        filesystem, path = arrow.FileSystem.from_uri(uri)
        return filesystem, path
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    bucket = parts.netloc.rpartition("@")[2]
    if not region:
        region = "us-east-1" if endpoint else arrow.resolve_s3_region(bucket)
    filesystem = PatientS3FileSystem(
        parts.username == "anonymous",
        region,
        endpoint or None,
        int(os.environ.get("AWS_MAX_ATTEMPTS", attempts)),
    )
    return filesystem, f"{bucket}{unquote(parts.path)}".rstrip("/")


def _gcs(uri: str) -> tuple[arrow.FileSystem, str]:
    parts = urlsplit(uri)
    filesystem = arrow.GcsFileSystem(
        anonymous=parts.username == "anonymous", retry_time_limit=timedelta(seconds=_REQUEST_TIMEOUT)
    )
    return filesystem, f"{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}".rstrip("/")
