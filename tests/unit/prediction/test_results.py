"""Result files of models that give a picture several labels."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cvdist.prediction import results
from cvdist.results import ModelIdentity

CLASSES = ("cat", "dog", "sofa")
PROBABILITIES = torch.tensor([[0.9, 0.1, 0.6], [0.3, 0.2, 0.1], [0.1, 0.8, 0.1]])


def dump(thresholds=(0.9, 0.75, 0.5), probabilities=PROBABILITIES, **changes):
    identity = ModelIdentity("resnet18", CLASSES, 3, 224, 224, **{"multilabel": True, **changes})
    paths = ["a.jpg", "b.jpg", "c.jpg"][: len(probabilities)]
    return results.dump(paths, probabilities, identity, thresholds, [])


def test_labels_are_the_classes_at_or_above_their_thresholds():
    at_least = float(PROBABILITIES[0, 0])  # of float32, a little less than 0.9
    content, counts = dump((at_least, 0.75, 0.5))
    table = pq.read_table(io.BytesIO(content))
    assert table.column_names == ["path", "labels", "probabilities"]
    assert table["labels"].to_pylist() == [["cat", "sofa"], [], ["dog"]]
    assert table.schema.field("labels").type == pa.list_(pa.string())
    assert torch.equal(torch.tensor(table["probabilities"].to_pylist()), PROBABILITIES)
    assert json.loads(table.schema.metadata[b"cvdist.thresholds"]) == [at_least, 0.75, 0.5]
    assert counts == {"cat": 1, "dog": 1, "sofa": 1, "": 1}
    above, _ = dump((0.91, 0.75, 0.5))
    assert pq.read_table(io.BytesIO(above))["labels"].to_pylist()[0] == ["sofa"]
    shown = results.load(content)
    assert [one.labels for one in shown] == [["cat", "sofa"], [], ["dog"]]
    assert [name for name, _ in shown[1].likely] == ["cat", "dog", "sofa"]


def test_files_of_any_work_unit_have_one_schema():
    full, empty, none = dump()[0], dump(probabilities=PROBABILITIES[:0])[0], dump((1.1,) * 3)[0]
    kinds = [pq.read_schema(io.BytesIO(content)).remove_metadata() for content in (full, empty, none)]
    assert kinds[0].equals(kinds[1]) and kinds[0].equals(kinds[2])


def test_one_label_a_picture_has_a_class_and_its_confidence():
    content, counts = dump((), multilabel=False)
    table = pq.read_table(io.BytesIO(content))
    assert table.column_names == ["path", "class", "confidence", "probabilities"]
    assert table["class"].to_pylist() == ["cat", "cat", "dog"] and counts == {"cat": 2, "dog": 1}
    assert b"cvdist.thresholds" not in table.schema.metadata
    assert [one.labels for one in results.load(content)] == [None] * 3
