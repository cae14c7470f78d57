"""Reads and writes files by path or URI (`/folder`, `file://`, `s3://`, `gs://`), through pyarrow.

The names of objects are taken as they are, as by the tools of Amazon and Google: `s3://bucket/100% #1` is the
object `100% #1`. In a `file://` URI, `%20` is a space.
S3 takes its settings from the usual environment variables of AWS: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
(or a profile, or the role of the node), AWS_REGION, AWS_ENDPOINT_URL (for servers other than Amazon's),
AWS_MAX_ATTEMPTS. `s3://anonymous@bucket` reads a public bucket without credentials.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as arrow

from cvdist import slow_requests
from cvdist.errors import UserError
from cvdist.log import redact

_CONNECT_TIMEOUT = 10.0  # seconds
_REQUEST_TIMEOUT = 60.0  # seconds without a byte
_ATTEMPTS = 4  # per request, with growing pauses
_PATIENT_ATTEMPTS = 10  # per request in the middle of a long job: about a minute
_LISTINGS = 16  # folders of a bucket at a time
_MOST_FOLDERS = 10_000  # that are listed each by itself
_BATCH = 10_000  # files and folders in a piece of a listing, about
# Options of pyarrow at the end of an S3 URI. Any other question mark belongs to the object's name.
_S3_OPTIONS = re.compile(r"\?((scheme|region|endpoint_override|allow_\w+|\w*timeout|tls_\w+)=[^&]*&?)+$")
_SIGNS = "*?["  # of patterns
_REFUSED = r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|InvalidAccessKeyId|HTTP response code 403"
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


ENTRIES = pa.schema(
    [("path", pa.string()), ("is_folder", pa.bool_()), ("size", pa.int64()), ("modified", pa.int64())]
)
"""Of a listing: path below the listed folder, whether it is a folder, size in bytes, and time of the last
change in ns since 1970, 0 if unknown."""


def locate(uri: str, flag: str = "--storage", *, patient: bool = False) -> tuple[arrow.FileSystem, str]:
    """Return the file system of `uri` and the path in it.

    Args:
        uri: Path or URI.
        flag: The flag that `uri` was given with, for error messages.
        patient: Whether to retry requests for about a minute if the server is unreachable. The environment
            variable AWS_MAX_ATTEMPTS overrides this.

    Raises:
        UserError: If the URI is not valid.
    """
    if "://" not in uri:
        return arrow.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        if uri.startswith("s3://"):
            return _s3(uri, _PATIENT_ATTEMPTS if patient else _ATTEMPTS)
        if uri.startswith("gs://"):
            return _gcs(uri)
        if uri.startswith("file://"):
            return arrow.LocalFileSystem(), _file_path(uri)
        filesystem, path = arrow.FileSystem.from_uri(uri)
    except Exception as error:  # arrow raises various types for schemes, buckets and credentials
        raise UserError(f"{flag} {redact(uri)}: {reason(error)}") from error
    return filesystem, path


def list_entries(uri: str, flag: str) -> Iterator[pa.RecordBatch]:
    """List all files and folders below `uri`, at any depth, in no particular order, as `walk` does.

    Raises:
        UserError: If the folder does not exist or can't be read.
    """
    filesystem, root = locate(uri, flag)
    try:
        yield from walk(filesystem, root)
    except OSError as error:
        raise _unreadable(uri, flag, error) from error


def walk(filesystem: arrow.FileSystem, folder: str) -> Iterator[pa.RecordBatch]:
    """List all files and folders below a folder that exists, in memory that grows little with their number.

    Links count as what they lead to, except for those that lead nowhere or back to a folder above them. In
    object storage, folders are listed in parallel.

    Args:
        filesystem: File system of the folder.
        folder: Path of the folder.

    Yields:
        Many at a time (`ENTRIES`), with paths below `folder`. There is an empty batch for each second in which
        nothing has arrived, so that the caller can show progress.

    Raises:
        OSError: If it can't be read.
    """
    start = len(folder.rstrip("/")) + 1
    if not isinstance(filesystem, arrow.LocalFileSystem):  # the only one with links
        yield from _walk_bucket(filesystem, folder, start)
        return
    found: list[arrow.FileInfo] = []
    for infos in _walk_disk(filesystem, folder, frozenset()):
        found += infos
        if len(found) >= _BATCH:
            yield from _batches(found, start)
    yield from _batches(found, start)


def _walk_disk(
    filesystem: arrow.FileSystem, folder: str, above: frozenset[str]
) -> Iterator[list[arrow.FileInfo]]:
    """List as `walk` does, one folder at a time; `above`: real paths of the folders above this one."""
    above |= {os.path.realpath(folder)}
    found = filesystem.get_file_info(arrow.FileSelector(folder))
    folders = [info.path for info in found if info.type == arrow.FileType.Directory]
    circles = {path for path in folders if os.path.realpath(path) in above}
    yield [info for info in found if info.path not in circles] if circles else found
    del found
    for path in folders:
        if path not in circles:
            yield from _walk_disk(filesystem, path, above)


def _walk_bucket(filesystem: arrow.FileSystem, folder: str, start: int) -> Iterator[pa.RecordBatch]:
    """List as `walk` does, level by level until there are enough folders, then all below these in parallel."""

    def listed(path: str, recursive: bool) -> list[pa.RecordBatch]:
        found = filesystem.get_file_info(arrow.FileSelector(path, recursive=recursive))
        return list(_batches(found, start))

    with ThreadPoolExecutor(_LISTINGS) as pool:
        level = [folder]
        while 0 < len(level) < _LISTINGS:
            batches = []
            for batch in _arriving(pool.submit(listed, path, False) for path in level):
                if len(batch):
                    batches.append(batch)
                else:
                    yield batch
            below = [path for batch in batches for path in batch.filter(batch["is_folder"])["path"].to_pylist()]
            if len(below) > _MOST_FOLDERS:  # fewer requests, one after the other
                break
            yield from batches
            level = [f"{folder.rstrip('/')}/{path}" for path in below]
        yield from _arriving(pool.submit(listed, path, True) for path in level)


def _arriving(futures: Iterable[Future[list[pa.RecordBatch]]]) -> Iterator[pa.RecordBatch]:
    """Yield the results in order, and an empty batch for each second of waiting."""
    left = deque(futures)
    try:
        while left:
            wait([left[0]], timeout=1)
            yield from left.popleft().result() if left[0].done() else [_batch([], 0)]
    finally:
        for future in left:
            future.cancel()


def _batches(infos: list[arrow.FileInfo], start: int) -> Iterator[pa.RecordBatch]:
    """Convert entries to columns. This empties the list, because its entries take several times the memory."""
    while infos:
        yield _batch(infos[-_BATCH:], start)
        del infos[-_BATCH:]


def _batch(infos: Sequence[arrow.FileInfo], start: int) -> pa.RecordBatch:
    return pa.record_batch(
        [
            pa.array([info.path[start:] for info in infos], pa.string()),
            pa.array([info.type == arrow.FileType.Directory for info in infos], pa.bool_()),
            pa.array([info.size or 0 for info in infos], pa.int64()),
            pa.array([info.mtime_ns or 0 for info in infos], pa.int64()),
        ],
        schema=ENTRIES,
    )


State = tuple[int, int] | None
"""A file's size in bytes and time of last change in ns since 1970; None for a folder."""


def state_of(info: arrow.FileInfo) -> State:
    """Return what tells whether a file has changed."""
    return None if info.type == arrow.FileType.Directory else (info.size or 0, info.mtime_ns or 0)


def match(
    filesystem: arrow.FileSystem, folder: str, parts: Sequence[str], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, State]]:
    """Find the folders and files that match a pattern with `*`, `?`, `[...]` and `**`, except for hidden ones.

    Args:
        filesystem: File system of the folder.
        folder: Path of the folder.
        parts: Pattern below the folder, cut at slashes.
        wanted: Returns whether a file of this name counts, if the pattern does not name it in full.

    Raises:
        OSError: If a folder can't be read.
    """
    first, *rest = parts
    if not any(sign in part for part in parts for sign in _SIGNS):
        info = filesystem.get_file_info("/".join([folder, *parts]))
        yield from [(info.path, state_of(info))] if info.type != arrow.FileType.NotFound else []
        return
    if not any(sign in first for sign in _SIGNS):
        yield from match(filesystem, f"{folder}/{first}", rest, wanted)
        return
    if first == "**":
        if filesystem.get_file_info(folder).type == arrow.FileType.Directory:
            for batch in walk(filesystem, folder):
                for one in batch.filter(pc.invert(batch["is_folder"])).to_pylist():
                    path = one["path"].split("/")
                    hidden = any(part.startswith(".") for part in path)
                    if wanted(path[-1]) and not hidden and _lies_in(path, [*parts]):
                        yield f"{folder}/{one['path']}", (one["size"], one["modified"])
        return
    selector = arrow.FileSelector(folder, allow_not_found=True)
    listed = [info for info in filesystem.get_file_info(selector) if not info.base_name.startswith(".")]
    for info in listed:
        if info.type != arrow.FileType.Directory:
            continue
        if fnmatchcase(info.base_name, first):
            yield from match(filesystem, info.path, rest, wanted) if rest else [(info.path, None)]
    for info in listed if not rest else ():
        if fnmatchcase(info.base_name, first) and wanted(info.base_name):
            yield info.path, state_of(info)


def _lies_in(path: list[str], pattern: list[str]) -> bool:
    """Return whether a pattern, in which `**` is any number of folders, matches `path` or a folder above it."""
    if not pattern:
        return True
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_lies_in(path[start:], rest) for start in range(len(path)))
    return bool(path) and fnmatchcase(path[0], first) and _lies_in(path[1:], rest)


def read(filesystem: arrow.FileSystem, path: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: If it does not exist, or not any more.
        OSError: If it can't be read.
    """
    if isinstance(filesystem, arrow.LocalFileSystem):
        return Path(path).read_bytes()
    with slow_requests.measured(path) as sizes:
        try:
            # Otherwise arrow would decompress files with names such as `*.gz`.
            with filesystem.open_input_stream(path, compression=None) as stream:
                content: bytes = stream.read()
        except OSError as error:
            # Deleted while open. The answer may not fit a small file's buffer, and that is the error then.
            gone = re.search("NO_SUCH_KEY|NOT_FOUND|Failed to flush response stream", str(error))
            if gone and filesystem.get_file_info(path).type == arrow.FileType.NotFound:
                raise FileNotFoundError(path) from error
            raise
        sizes.append(len(content))
        return content


def etag_of(file: pa.NativeFile) -> str:
    """Return the ETag of an open object; empty where the storage has none."""
    found = file.metadata() or {}
    return str(found.get(b"ETag", found.get("ETag", b"")).decode().strip('"'))


def write(filesystem: arrow.FileSystem, path: str, content: bytes) -> None:
    """Write a file atomically: it appears with its whole content or not at all. An existing file is replaced.

    Raises:
        OSError: If it can't be written.
    """
    if not isinstance(filesystem, arrow.LocalFileSystem):
        # Object stores are atomic: an object appears when its upload is complete.
        with (
            slow_requests.measured(path, len(content)),
            filesystem.open_output_stream(path, compression=None) as stream,
        ):
            stream.write(content)
        return
    write_here(Path(path), content)


def write_here(target: Path, content: bytes) -> None:
    """Write a file of this machine atomically, and the folder that it lies in. An existing file is replaced.

    Raises:
        OSError: If it can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash of the machine could leave an empty file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(files: Mapping[str, bytes], flag: str) -> None:
    """Write files by their paths or URIs: all of them, or none.

    Raises:
        UserError: If one can't be written.
    """
    written: list[tuple[arrow.FileSystem, str]] = []
    for uri, content in files.items():
        filesystem, path = locate(uri, flag)
        try:
            write(filesystem, path, content)
        except OSError as error:
            for where, one in written:
                where.delete_file(one)
            raise UserError(f"{flag} {redact(uri)} can't be written ({reason(error)})") from error
        written.append((filesystem, path))


def file_digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file of this machine."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Folder:
    """A folder in a file system, or a prefix in a bucket. Can be used from several threads.

    Attributes:
        uri: Path or URI of the folder.
        filesystem: Its file system.
        root: Path in the file system. Names of files are relative to it.
        flag: The flag that the URI was given with, for error messages.
    """

    uri: str
    filesystem: arrow.FileSystem
    root: str
    flag: str

    @classmethod
    def open(cls, uri: str, flag: str, *, patient: bool = False) -> Folder:
        """Create a folder object for `uri`; nothing is read or created.

        Args:
            uri: Path or URI.
            flag: The flag that `uri` was given with, for error messages.
            patient: Whether to retry requests for about a minute if the server is unreachable.

        Raises:
            UserError: If the URI is not valid.
        """
        filesystem, root = locate(uri, flag, patient=patient)
        return cls(uri, filesystem, root, flag)

    def read(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            UserError: If it does not exist or can't be read.
        """
        with self._reading(name):
            return read(self.filesystem, f"{self.root}/{name}")

    def find(self, name: str) -> bytes | None:
        """Read a whole file, or return None if it does not exist.

        Raises:
            UserError: If it can't be read.
        """
        with self._reading(name), suppress(FileNotFoundError):
            return read(self.filesystem, f"{self.root}/{name}")
        return None

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist.

        Raises:
            UserError: If the storage can't be read.
        """
        with self._reading(name):
            info = self.filesystem.get_file_info(f"{self.root}/{name}")
        return info.size if info.type == arrow.FileType.File else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically. An existing file is replaced.

        Raises:
            UserError: If it can't be written.
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
            UserError: If it does not exist or can't be deleted.
        """
        try:
            self.filesystem.delete_file(f"{self.root}/{name}")
        except OSError as error:
            raise UserError(
                f"{self.flag} {redact(self.uri)}: {name} can't be deleted ({reason(error)})"
            ) from error

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of all files in the folder, at any depth, by name. Empty without a folder.

        Raises:
            UserError: If the folder can't be listed.
        """
        selector = arrow.FileSelector(self.root, recursive=True, allow_not_found=True)
        with self._reading(), slow_requests.measured(f"the list of {self.root}"):
            found = self.filesystem.get_file_info(selector)
        prefix = len(self.root) + 1
        return {info.path[prefix:]: info.size for info in found if info.type == arrow.FileType.File}

    @contextmanager
    def _reading(self, name: str = "") -> Iterator[None]:
        """Raise a UserError if the file `name`, or the folder itself, can't be read in the block."""
        try:
            yield
        except OSError as error:
            uri = f"{self.uri.rstrip('/')}/{name}" if name else self.uri
            raise _unreadable(uri, self.flag, error) from error


def file_state(uri: str, flag: str) -> arrow.FileInfo:
    """Return size and modification time of a file, which tell whether it has changed.

    Raises:
        UserError: If it does not exist or can't be read.
    """
    filesystem, path = locate(uri, flag)
    try:
        info = filesystem.get_file_info(path)
        if info.type != arrow.FileType.File:
            raise FileNotFoundError("there is no such file")
    except OSError as error:
        raise _unreadable(uri, flag, error) from error
    return info


def download(uri: str, target: Path, flag: str) -> None:
    """Copy one file to the local path `target`, which appears with its whole content or not at all.

    Raises:
        UserError: If it can't be read.
    """
    filesystem, path = locate(uri, flag)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        arrow.copy_files(
            path, str(temporary), source_filesystem=filesystem, destination_filesystem=arrow.LocalFileSystem()
        )
        temporary.replace(target)
    except OSError as error:
        raise _unreadable(uri, flag, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_file(filesystem: arrow.FileSystem, path: str) -> bool:
    """Return whether `path` is a file rather than a folder. False if it does not exist or can't be read."""
    try:
        return bool(filesystem.get_file_info(path).type == arrow.FileType.File)
    except OSError:
        return False


def split(uri: str) -> tuple[str, str, str]:
    """Cut `uri` into the place (empty: this machine), the absolute path there, and the options of an S3 URI."""
    if "://" not in uri or uri.startswith("file://"):
        return "", os.path.normpath(_file_path(uri) if "://" in uri else absolute(uri)), ""
    options = _S3_OPTIONS.search(uri)
    user, bucket, path = _parts(uri[: options.start()] if options else uri)
    return f"{uri.partition('://')[0]}://{user}{bucket}", path, options[0] if options else ""


def parent(uri: str) -> str:
    """Return the path or URI of the folder that a file lies in."""
    place, path, options = split(uri)
    return f"{place}{PurePosixPath(path).parent}{options}"


def joined(uri: str, path: str) -> str:
    """Return the path or URI of `path` below the folder `uri`, with the options of `uri`."""
    place, root, options = split(uri)
    return f"{place}{root.rstrip('/')}/{path}{options}" if path else uri


def absolute(uri: str) -> str:
    """Make a relative path absolute, so that it holds in other working folders. URIs stay as they are."""
    return uri if not uri or "://" in uri else str(Path(uri).expanduser().absolute())


def absolute_if_there(name: str) -> str:
    """Make `name` absolute if it is a path or a pattern of files that exist; else return it unchanged.

    A pattern counts as existing if the folder before its first special character exists.
    """
    start = re.split(r"[*?{]", name, maxsplit=1)[0]
    there = name if start == name else start.rpartition("/")[0] or "."
    return absolute(name) if "://" not in name and name and Path(there).expanduser().exists() else name


def exists(uri: str) -> bool:
    """Return whether there is a file or a folder at `uri`."""
    filesystem, path = locate(uri)
    return filesystem.get_file_info(path).type != arrow.FileType.NotFound


def check_writable(uri: str, flag: str = "--storage") -> None:
    """Check that a folder can be written: create it, write a small file into it, and delete the file.

    Args:
        uri: Path or URI of the folder.
        flag: The flag that `uri` was given with, for error messages.

    Raises:
        UserError: If the folder can't be written.
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
    """Provide a local folder: the folder itself if it is local, else a copy that is deleted at the end.

    Raises:
        UserError: If the folder can't be read.
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
    """Return the reason of an error in one line: the message of the operating system or of the library."""
    number = getattr(error, "errno", None)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Arrow also sets `errno` on errors of AWS, which do not come from the operating system.
    if isinstance(number, int) and "AWS Error" not in text:
        return os.strerror(number)
    return re.sub(r"\s*\(Request ID.*?\)|, x-amz-\S+.*$", "", text)[:300]


def may_recover(error: OSError | UserError) -> bool:
    """Return whether a request that failed may succeed later; False for a missing permission and the like."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if "AWS Error" in str(cause):
        return not re.search(rf"{_REFUSED}|NO_SUCH_BUCKET", str(cause))
    return not (isinstance(cause, OSError) and cause.errno in _LASTING)


def free_bytes(uri: str) -> int | None:
    """Return the free bytes for the folder `uri`, which need not exist; None if it is not on a disk."""
    filesystem, path = locate(uri)
    if not isinstance(filesystem, arrow.LocalFileSystem):
        return None
    return shutil.disk_usage(next(one for one in (Path(path), *Path(path).parents) if one.exists())).free


def _unreadable(uri: str, flag: str, error: Exception) -> UserError:
    """Create the error for a file or folder that can't be read, with a hint for common causes."""
    why = reason(error)
    hint = ""
    if re.search(_REFUSED, why):
        hint = ": check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
    elif re.search(r"NETWORK_CONNECTION|curlCode|resolve", why):
        hint = ": check AWS_ENDPOINT_URL and the network"
    elif isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in why:
        why, hint = "there is no such file, folder or bucket", ""
    return UserError(f"{flag} {redact(uri)} can't be read ({why}){hint}")


class PatientS3FileSystem(arrow.S3FileSystem):
    """S3 with timeouts for all requests. Unlike its base class, it keeps its retries when it is pickled."""

    def __init__(self, anonymous: bool, region: str, endpoint: str | None, attempts: int) -> None:
        """Connect to S3 or a compatible server.

        Args:
            anonymous: Whether to send requests without credentials.
            region: Region of the bucket.
            endpoint: Address of the server. None: Amazon's.
            attempts: Attempts per request, with growing pauses.
        """
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
        """Pickle without credentials, which the other process takes from its own environment."""
        return PatientS3FileSystem, self._settings


def _s3(uri: str, attempts: int) -> tuple[arrow.FileSystem, str]:
    """Return file system and path of an S3 URI, like `FileSystem.from_uri` but with timeouts for requests."""
    head, path, options = split(uri)
    user, bucket, _ = _parts(head)
    if options or ":" in user or not bucket:
        # The URI contains options or credentials, or is malformed: arrow handles it.
        filesystem, _ = arrow.FileSystem.from_uri(f"{head}{quote(path)}{options}")
        return filesystem, f"{bucket}{path}"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else arrow.resolve_s3_region(bucket)
    filesystem = PatientS3FileSystem(
        user == "anonymous@",
        region,
        endpoint or None,
        int(os.environ.get("AWS_MAX_ATTEMPTS", attempts)),
    )
    return filesystem, f"{bucket}{path}"


def _gcs(uri: str) -> tuple[arrow.FileSystem, str]:
    user, bucket, path = _parts(uri)
    filesystem = arrow.GcsFileSystem(
        anonymous=user == "anonymous@", retry_time_limit=timedelta(seconds=_REQUEST_TIMEOUT)
    )
    return filesystem, f"{bucket}{path}"


def _parts(uri: str) -> tuple[str, str, str]:
    """Cut a URI into the user with its @, the bucket, and the path with its slash; any may be empty."""
    place, slash, path = uri.partition("://")[2].partition("/")
    user, at, bucket = place.rpartition("@")
    return user + at, bucket, f"{slash}{path}".rstrip("/")


def _file_path(uri: str) -> str:
    path = unquote(uri.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise ValueError("a file's URI has three slashes and an absolute path, file:///folder")
    return str(Path(path))
