"""The same labeled pictures in several forms."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of files, by name and content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as target:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))
    return path


def parquet(
    path: Path,
    pictures: Sequence[bytes | None],
    labels: Sequence[object],
    *,
    names: Sequence[str] = (),
    paths: Sequence[str | None] = (),
    row_group: int = 3,
) -> Path:
    """Write pictures as Hugging Face does; names: of the classes, whose numbers `labels` are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = paths or [None] * len(pictures)
    images = [one and {"bytes": one, "path": name} for one, name in zip(pictures, own, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels)})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group)
    return path


def of_folder(folder: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    """Class, name and content of each picture of `SPLIT/CLASS/picture.jpg`, by split."""
    found: dict[str, list[tuple[str, str, bytes]]] = {}
    for path in sorted(folder.glob("*/*/*.jpg")):
        split, label = path.relative_to(folder).parts[:2]
        found.setdefault(split, []).append(
            (label, f"{label}-{path.stem.replace('.', '-')}.jpg", path.read_bytes())
        )
    return found


def write_all(folder: Path, target: Path, row_group: int = 3) -> dict[str, str]:
    """Write the pictures of a folder as tars and as Parquet files, two of each split: `--data` by form."""
    for split, pictures in of_folder(folder).items():
        classes = sorted({label for label, _, _ in pictures})
        for number in range(2):
            mine = pictures[number::2]
            stems = [(label, name.removesuffix(".jpg"), content) for label, name, content in mine]
            tar(
                target / "tars" / f"{split}-{number:06}.tar",
                [
                    one
                    for label, stem, content in stems
                    for one in ((f"{stem}.jpg", content), (f"{stem}.cls", label.encode()))
                ],
            )
            parquet(
                target / "parquet" / "data" / f"{split}-{number:05}-of-00002.parquet",
                [content for _, _, content in mine],
                [classes.index(label) for label, _, _ in mine],
                names=classes,
                paths=[name for _, name, _ in mine],
                row_group=row_group,
            )
    splits = ",".join(sorted(of_folder(folder)))
    return {
        "folder": str(folder),
        "tars": f"{target}/tars/{{{splits}}}-{{000000..000001}}.tar",
        "a folder of tars": f"{target}/tars",
        "Parquet": f"{target}/parquet/data/*.parquet",
        "a folder of Parquet": f"{target}/parquet",
    }
