"""The result files of a prediction job and their manifest, in the format of docs/prediction-format.md."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cvdist.data.quarantine import BadPicture
from cvdist.errors import UserError
from cvdist.log import redact
from cvdist.multilabel import at_or_above
from cvdist.results import ModelIdentity
from cvdist.resumable_map import MANIFEST
from cvdist.storage import Folder

FORMAT, VERSION = "cvdist-predictions", 1
_CLASSES, _THRESHOLDS, _SLICE = b"cvdist.classes", b"cvdist.thresholds", b"cvdist.slice"


def dump(
    paths: Sequence[str],
    probabilities: Tensor,
    identity: ModelIdentity,
    thresholds: Sequence[float],
    bad: Sequence[BadPicture],
) -> tuple[bytes, dict[str, int]]:
    """Build a result file in memory.

    Args:
        paths: paths of the n pictures that have a prediction.
        probabilities: float32 (n, classes).
        identity: architecture and classes of the model.
        thresholds: thresholds of a model with several labels per picture (`SavedModel.thresholds`).
        bad: pictures that can't be decoded.

    Returns:
        The content of the file, and the number of pictures that were taken for each class; the empty name has
        the number of those without any label.
    """
    classes = identity.classes
    described = {_CLASSES: json.dumps(list(classes)).encode()}
    columns: dict[str, pa.Array] = {"path": pa.array(paths, pa.string())}
    if identity.multilabel:
        described[_THRESHOLDS] = json.dumps(list(thresholds)).encode()
        found = at_or_above(probabilities, thresholds)
        labels = [list(compress(classes, row)) for row in found.tolist()]
        columns["labels"] = pa.array(labels, pa.list_(pa.string()))
    else:
        confidence, predicted = probabilities.max(1)
        labels = [[classes[i]] for i in predicted.tolist()]
        columns["class"] = pa.array([name for (name,) in labels], pa.string())
        columns["confidence"] = pa.array(confidence.numpy())
    columns["probabilities"] = pa.FixedSizeListArray.from_arrays(
        pa.array(probabilities.flatten().numpy()), len(classes)
    )
    counts = dict(sorted(Counter(name for names in labels for name in names or [""]).items()))
    summary = {"counts": counts, "bad": [[picture.path, picture.reason] for picture in bad]}
    table = pa.table(columns).replace_schema_metadata({**described, _SLICE: json.dumps(summary).encode()})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue(), counts


@dataclass(frozen=True)
class PredictedPicture:
    """Path of a picture, and its classes with their probabilities, the likeliest first.

    labels: the classes at or above their thresholds; None from a model that gives a picture one class.
    """

    path: str
    likely: list[tuple[str, float]]
    labels: list[str] | None


def load(content: bytes) -> list[PredictedPicture]:
    """Read a result file."""
    table = pq.read_table(io.BytesIO(content))
    classes = json.loads(table.schema.metadata[_CLASSES])
    return [
        PredictedPicture(
            row["path"],
            sorted(zip(classes, row["probabilities"], strict=True), key=lambda item: -item[1]),
            row.get("labels"),
        )
        for row in table.to_pylist()
    ]


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
