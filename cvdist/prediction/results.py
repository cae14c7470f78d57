"""Files of predictions, and the manifest that names them. The format: docs/prediction-format.md."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cvdist.data.dataset import BadPicture
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.storage import Folder

MANIFEST, QUARANTINE, FOLDER, SUFFIX = "manifest.json", "quarantine.csv", "predictions", ".parquet"
FORMAT, VERSION = "cvdist-predictions", 1
_CLASSES, _SLICE = b"cvdist.classes", b"cvdist.slice"


@dataclass(frozen=True)
class Part:
    """One file of predictions. bytes: its size; counts: how many pictures were taken for each class."""

    object: str
    rows: int
    bytes: int
    counts: dict[str, int]
    bad: tuple[BadPicture, ...]

    @property
    def pictures(self) -> int:
        """Good and bad."""
        return self.rows + len(self.bad)


def name_of(key: str) -> str:
    """Where the predictions of a slice are."""
    return f"{FOLDER}/{key}{SUFFIX}"


def schema(classes: Sequence[str]) -> pa.Schema:
    """Columns of a file; its metadata have the classes, in the order of the probabilities."""
    fields = [
        pa.field("path", pa.string()),
        pa.field("class", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("probabilities", pa.list_(pa.float32(), len(classes))),
    ]
    return pa.schema(fields, {_CLASSES: json.dumps(list(classes)).encode()})


def dump(
    paths: Sequence[str], probabilities: Tensor, classes: Sequence[str], bad: Sequence[BadPicture]
) -> tuple[bytes, Part]:
    """A file, and what it will be known by once it is written (`object` is for the caller to fill in).

    probabilities: float32 (n, classes), of the n pictures at `paths`.
    """
    confidence, predicted = probabilities.max(1)
    names = [classes[i] for i in predicted.tolist()]
    columns = [
        pa.array(paths, pa.string()),
        pa.array(names, pa.string()),
        pa.array(confidence.numpy()),
        pa.FixedSizeListArray.from_arrays(pa.array(probabilities.flatten().numpy()), len(classes)),
    ]
    counts = dict(sorted(Counter(names).items()))
    described = schema(classes)
    summary = {"counts": counts, "bad": [[picture.path, picture.reason] for picture in bad]}
    described = described.with_metadata({**described.metadata, _SLICE: json.dumps(summary).encode()})
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=described), file, compression="zstd")
    content = file.getvalue()
    return content, Part("", len(paths), len(content), counts, tuple(bad))


def find(folder: Folder, key: str, size: int) -> Part | None:
    """What is known of the file of a slice, of `size` bytes, from its footer; None if it is damaged."""
    name = name_of(key)
    try:
        with folder.filesystem.open_input_file(f"{folder.root}/{name}") as file:
            metadata = pq.read_metadata(file)
        summary = json.loads(metadata.metadata[_SLICE])
        bad = tuple(BadPicture(path, reason) for path, reason in summary["bad"])
        return Part(name, metadata.num_rows, size, summary["counts"], bad)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def to_json(part: Part) -> bytes:
    """For another process."""
    return json.dumps(asdict(part)).encode()


def from_json(content: bytes) -> Part:
    """Inverse of `to_json`."""
    values = json.loads(content)
    return Part(**{**values, "bad": tuple(BadPicture(**picture) for picture in values["bad"])})


def dump_manifest(values: Mapping[str, Any]) -> bytes:
    """As JSON, with format and version."""
    return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1).encode()


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """The manifest in `folder`; None if there is none, or it can't be read as one.

    Raises:
        UserError: if it is that of something else, or of another version.
    """
    content = folder.find(MANIFEST)
    try:
        values = json.loads(content) if content else None
    except ValueError:
        return None
    if values is None:
        return None
    if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{folder.flag} {redact(folder.uri)} has a {MANIFEST} of something else than version {VERSION} of "
            "predictions: name another folder"
        )
    return values
