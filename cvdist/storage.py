"""Files by path or URI (`/folder`, `file://`, `s3://`, `gs://`), through pyarrow.

S3 takes its settings from the usual AWS variables, AWS_ENDPOINT_URL for other servers than Amazon's included.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pyarrow import fs as arrow

from cvdist.errors import UserError
from cvdist.log import redact


def locate(uri: str) -> tuple[arrow.FileSystem, str]:
    """The file system behind `uri`, and the path in it.

    Raises:
        UserError: if the URI can't be understood.
    """
    if "://" not in uri:
        return arrow.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        filesystem, path = arrow.FileSystem.from_uri(uri)
    except Exception as error:  # arrow raises its own kinds for schemes, buckets and credentials
        raise UserError(f"--storage {redact(uri)}: {_reason(error)}") from error
    return filesystem, path


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    filesystem, path = locate(uri)
    return filesystem.get_file_info(path).type != arrow.FileType.NotFound


def check_writable(uri: str) -> None:
    """Make the folder, write a small file into it and delete it.

    Raises:
        UserError: if that is not possible, with the reason.
    """
    filesystem, path = locate(uri)
    marker = f"{path}/.write-check-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if isinstance(filesystem, arrow.LocalFileSystem):
            filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(marker) as stream:
            stream.write(b"may be deleted")
        filesystem.delete_file(marker)
    except OSError as error:
        raise UserError(
            f"the storage {redact(uri)} can't be written: {_reason(error)}. Name another folder or URI with "
            "--storage or CVDIST_STORAGE, or give this one the permission"
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
            raise UserError(f"{redact(uri)} can't be read: {_reason(error)}") from error
        yield Path(folder)


def _reason(error: Exception) -> str:
    """What a person can use of an error: the operating system's words, or the library's first line."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return os.strerror(number)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
