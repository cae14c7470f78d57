"""The index of a feature cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cvdist.features import index


@given(st.lists(st.sets(st.integers(0, 9)), max_size=30), st.booleans())
def test_an_index_reads_back_as_it_was_written(sets, several):
    import pyarrow as pa

    count = len(sets)
    values = {field.name: pa.nulls(count, field.type) for field in index.SCHEMA}
    values["label"] = pa.array(range(count), pa.int32())
    if several:
        values["classes"] = pa.array([sorted(one) for one in sets], pa.list_(pa.int32()))
    table = pa.table(values)
    assert index.load(index.dump(table)).equals(table)
