"""The result files of a prediction job and their manifest, in the format of docs/prediction-format.md."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cvdist.data.quarantine import BadPicture
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.resumable_map import MANIFEST
from cvdist.storage import Folder

FORMAT, VERSION = "cvdist-predictions", 1
_CLASSES, _SLICE = b"cvdist.classes", b"cvdist.slice"


def schema(classes: Sequence[str]) -> pa.Schema:
    """Return the schema of a result file, with the classes in the order of the probabilities as metadata."""
    fields = [
        pa.field("path", pa.string()),
        pa.field("class", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("probabilities", pa.list_(pa.float32(), len(classes))),
    ]
    return pa.schema(fields, {_CLASSES: json.dumps(list(classes)).encode()})


def dump(
    paths: Sequence[str], probabilities: Tensor, classes: Sequence[str], bad: Sequence[BadPicture]
) -> tuple[bytes, dict[str, int]]:
    """Build a result file in memory.

    Args:
        paths: paths of the n pictures that have a prediction.
        probabilities: float32 (n, classes).
        classes: names of the classes.
        bad: pictures that can't be decoded.

    Returns:
        The content of the file, and the number of pictures that were taken for each class.
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
    return file.getvalue(), counts


def dump_manifest(values: Mapping[str, Any]) -> bytes:
    """Write a manifest as JSON, with the format's name and version added."""
    return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1).encode()


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """Read the manifest in `folder`.

    Returns:
        Its values, or None if there is no manifest or it is not valid JSON.

    Raises:
        UserError: if it belongs to something other than predictions, or has another version.
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
