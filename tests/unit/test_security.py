"""What lies in storage may be damaged or hostile: no code runs, nothing outside is touched, memory is bound."""

from __future__ import annotations

import dataclasses
import json
import resource
import struct
import zlib

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cvdist.checkpoints import format as ckpt
from cvdist.data.images.decode import UndecodableError, decode
from cvdist.errors import UserError
from cvdist.features import manifest, shard
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.manifest import IndexEntry, Manifest, ShardEntry
from cvdist.tracking import journal
from tests.helpers.jobs import user_error

QUICK = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    identity = ckpt.ModelIdentity("scratch-cnn", ("a", "b"), 1, 8, 8)
    order = ckpt.OrderIdentity(10, 0)
    state = {
        "model": {"w": torch.arange(64.0)},
        "optimizer": {"state": {}},
        "rng": [{"cpu": torch.get_rng_state()}],
    }
    ckpt.save(
        folder,
        ckpt.Checkpoint(identity, order, ckpt.Progress(), None, state, ckpt.Normalization((0.5,), (0.5,))),
    )
    return folder


@QUICK
@given(
    file=st.sampled_from(["state.pt", "checkpoint.json"]),
    at=st.floats(0, 1, exclude_max=True),
    new=st.binary(max_size=20),
    cut=st.booleans(),
)
def test_a_changed_checkpoint_is_found_out(checkpoint, tmp_path_factory, file, at, new, cut):
    folder = tmp_path_factory.mktemp("changed")
    for name in ("state.pt", "checkpoint.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    content = (folder / file).read_bytes()
    place = int(at * len(content))
    changed = content[:place] + new + (b"" if cut else content[place + len(new) :])
    (folder / file).write_bytes(changed)
    if changed == content:
        return
    try:
        loaded = ckpt.load(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:  # white space in the JSON
        assert torch.equal(loaded.state["model"]["w"], torch.arange(64.0))


HARMLESS = {"object": "shards/x.zst", "rows": 1, "views": 1, "stored_bytes": 9, "raw_bytes": 9,
            "sha256": "0" * 64, "raw_sha256": "0" * 64, "zeros": 0}  # fmt: skip


def dumped(**changes):
    """A manifest with a right checksum, as somebody who means harm would make it."""
    fields = {field.name: "" for field in dataclasses.fields(Fingerprint)}
    entry = ShardEntry(**{**HARMLESS, **changes})
    index = IndexEntry("index/x", 1, 1, "0" * 64)
    return manifest.dump(Manifest(("a",), (1,), Fingerprint(**fields), "", "", "", "", index, (entry,), ()))


@pytest.mark.parametrize(
    "changes",
    [
        {"object": "../../etc/passwd"},
        {"object": "/etc/passwd"},
        {"object": "shards/../../x"},
        {"raw_sha256": "../" * 10 + "tmp/x"},
        {"raw_sha256": ("/tmp/x" + "0" * 64)[:64]},
        {"raw_bytes": -1},
        {"raw_bytes": 1 << 60},
    ],
)
def test_a_manifest_can_not_name_what_lies_outside(changes):
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        manifest.parse(dumped(**changes), "x")


@QUICK
@given(content=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["sha256", "format", "version", "shards", "finished", "values", "step", "time"]),
        inner, max_size=4),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
@example(b"[" * 100_000)
def test_manifests_and_journals_of_anything_are_one_line(content):
    user_error(manifest.parse, content, "x")
    user_error(journal.parse, content.decode(errors="replace") + "\n", "x")


def test_a_shard_that_claims_to_be_vast_is_not_unpacked():
    packed = shard.pack(torch.zeros(1, 1, 2), ["a"])
    with pytest.raises(shard.DamagedError, match="it claims to unpack to"):
        shard.unpack(packed.content, dataclasses.replace(packed, raw_bytes=1 << 40))


def png(width, height, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    )


@QUICK
@given(
    width=st.integers(0, 2**31 - 1),
    height=st.integers(0, 2**31 - 1),
    junk=st.binary(max_size=64),
    head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP"]),
)
@example(width=60_000, height=60_000, junk=b"", head=b"")
def test_image_headers_of_anything_do_not_allocate(width, height, junk, head):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in (png(width, height, junk), head + junk):
        try:
            assert decode(content, 32, "squash").shape == (32, 32, 3)
        except UndecodableError as error:
            assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in kB: one GB
