"""The feature cache without Ray: what is written is what is read, what is stale is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import config as configs
from cvdist import loaders, models
from cvdist.errors import UserError
from cvdist.features import build, maintenance, shard
from tests.helpers import feature_caches, pictures
from tests.helpers.feature_caches import (
    CPU,
    config,
    epoch,
    extract,
    manifest_of,
    opened,
    refusal,
    write_weights,
)

# --------------------------------------------------------------------------------------------------- the format


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    views=st.integers(1, 3),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from(sorted(shard.DTYPES)),
    names=st.lists(st.text(max_size=8), min_size=9, max_size=9),
)
def test_a_shard_reads_back_as_it_was_written(tmp_path_factory, rows, views, shape, dtype, names):
    features = torch.randn(rows, views, *shape).to(shard.DTYPES[dtype])
    packed = shard.pack(features, names[:rows])
    raw = shard.unpack(packed.content, packed)
    path = tmp_path_factory.mktemp("shard") / "some.safetensors"
    path.write_bytes(raw)
    assert torch.equal(shard.map_features(path), features)
    assert shard.read_ids(raw) == names[:rows]
    assert shard.matches(path, packed)


@pytest.mark.usefixtures("cached")
def test_the_format_needs_nothing_of_ours(chosen):
    """Read a cache with json, zstd and numpy alone, by what docs/feature-format.md says."""
    import pyarrow as pa

    root = Path(chosen.features.uri)
    about = json.loads((root / "manifest.json").read_text())
    assert (about["format"], about["version"], about["classes"]) == ("cvdist-features", 3, ["cat", "dog"])
    seen = []
    for entry in about["shards"]:
        stored = (root / entry["object"]).read_bytes()
        raw = pa.decompress(stored, decompressed_size=entry["raw_bytes"], codec="zstd", asbytes=True)
        header_size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + header_size])
        tensor = header["features"]
        begin, end = (8 + header_size + offset for offset in tensor["data_offsets"])
        values = np.frombuffer(raw[begin:end], np.float16).reshape(tensor["shape"])
        assert tensor["dtype"] == "F16" and values.shape == (entry["rows"], entry["views"], 512, 1, 1)
        assert (values == 0).sum() == entry["zeros"]
        begin, end = (8 + header_size + offset for offset in header["ids"]["data_offsets"])
        seen.append(raw[begin:end].decode())
    assert "".join(seen) == "".join(
        sorted(str(p.relative_to(chosen.data.uri)) for p in Path(chosen.data.uri).rglob("*.jpg"))
    )


def test_features_are_those_of_the_frozen_layers(chosen):
    chosen = configs.replace(chosen, features_dtype="float32")
    extract(chosen)
    cached = opened(chosen)
    uncached = opened(chosen, features="")
    frozen = models.build_frozen(chosen.model, chosen.data.image_size).module
    normal = models.preprocessing(chosen.model)
    uncached = loaders.open_loader(
        configs.replace(chosen, features=""), CPU, normalization=(normal.mean, normal.std)
    )
    for ours, theirs in zip(epoch(cached), epoch(uncached), strict=True):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.images, frozen(theirs.images), rtol=1e-4, atol=1e-5)
    assert cached.info.classes == uncached.info.classes
    pixels, names = cached.pictures("valid", [0, 4])
    expected, expected_names = uncached.pictures("valid", [0, 4])
    assert torch.equal(pixels, expected) and names == expected_names


def test_every_dtype_holds_the_features_to_its_precision(chosen):
    """`test_features_are_those_of_the_frozen_layers` compares float32 with the network."""
    found = {}
    for dtype in shard.DTYPES:
        there = configs.replace(chosen, features_dtype=dtype, features=f"{chosen.features.uri}-{dtype}")
        extract(there)
        (batch,) = opened(there).valid_batches(0, 1, 5)
        found[dtype] = batch.images
    for dtype, tolerance in {"float16": 1e-3, "bfloat16": 8e-3}.items():
        torch.testing.assert_close(found[dtype], found["float32"], rtol=tolerance, atol=1e-6)


def test_values_beyond_float16_are_refused(chosen, tmp_path):
    large = write_weights(tmp_path / "large.pth", scale=1e8)
    with pytest.raises(UserError, match=r"float16 can't hold the features of train/cat/0000\.jpg"):
        extract(configs.replace(chosen, weights=str(large)))
    extract(configs.replace(chosen, weights=str(large), features_dtype="bfloat16"))


def test_the_middle_of_the_network_can_be_cached(chosen):
    chosen = configs.replace(chosen, trainable_stages=2)
    built, _ = extract(chosen)
    assert built.manifest.feature_shape == (256, 4, 4) and built.manifest.fingerprint.cut == "features.10"
    assert epoch(opened(chosen))[0].images.shape == (4, 256, 4, 4)


@pytest.mark.usefixtures("cached")
def test_a_cache_made_otherwise_is_refused(chosen, tmp_path):
    other = write_weights(tmp_path / "other.pth", seed=1)
    assert "--weights (SHA-256 of the frozen layers): the cache has" in refusal(chosen, weights=str(other))
    assert "--image-size: the cache has 32, asked for is 64" in refusal(chosen, image_size=64)
    assert "--resize: the cache has squash, asked for is crop" in refusal(chosen, resize="crop")
    assert "last frozen layer): the cache has features.20, asked for is features.15" in refusal(
        chosen, trainable_stages=1
    )
    assert "--weights-preprocessing (mean)" in refusal(chosen, weights_preprocessing="vgg-features")
    assert "this run asks for augmentation" in refusal(chosen, rotation=5.0)
    assert "--views 2" in refusal(chosen, views=2)
    assert "has no manifest.json" in refusal(chosen, features=str(tmp_path / "nothing"))


@pytest.mark.usefixtures("cached")
def test_the_same_weights_in_another_file_are_the_same(chosen, tmp_path):
    whole = torch.load(chosen.model.weights, weights_only=True) | {
        f"classifier.{i}.{kind}": torch.ones(1).expand(shape)
        for i, (rows, columns) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items()
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    }
    torch.save(whole, tmp_path / "whole.pth")
    loaders.prepare(configs.replace(chosen, weights=str(tmp_path / "whole.pth")))


@pytest.mark.usefixtures("cached")
def test_pictures_that_changed_are_named(chosen, photos):
    loaders.prepare(chosen)
    added = photos / "train" / "cat" / "new.jpg"
    added.write_bytes(pictures.jpeg(77))
    assert "1 added, e.g. train/cat/new.jpg" in refusal(chosen)
    added.unlink()
    first = photos / "train" / "cat" / "0000.jpg"
    before = first.read_bytes()
    first.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # of the same size
    assert "1 changed, e.g. train/cat/0000.jpg" in refusal(chosen)
    first.write_bytes(before)  # with another time: its contents tell that it is the same
    loaders.prepare(chosen)
    first.unlink()
    assert "1 removed, e.g. train/cat/0000.jpg" in refusal(chosen)
    loaders.prepare(configs.replace(chosen, data=""))  # without naming pictures, there is nothing to compare


@pytest.mark.usefixtures("cached")
def test_a_copy_of_the_pictures_elsewhere_is_the_same(chosen, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    loaders.prepare(configs.replace(chosen, data=str(tmp_path / "copy")))


@pytest.mark.usefixtures("cached")
def test_a_copy_of_the_pictures_elsewhere_goes_on_with_what_is_there(chosen, photos, tmp_path):
    (Path(chosen.features.uri) / "manifest.json").unlink()  # as if the job had been killed before the last file
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    one = tmp_path / "copy" / "train" / "cat" / "0000.jpg"
    one.write_bytes(one.read_bytes()[:-1] + b"x")  # of the same size
    _, computed = extract(configs.replace(chosen, data=str(tmp_path / "copy"), max_bad_fraction=0.1))
    assert computed == [f"train/cat/000{i}.jpg" for i in range(4)]  # its shard


@pytest.mark.usefixtures("cached")
def test_pictures_with_other_names_keep_their_features_and_their_order(chosen, photos):
    before, digest = epoch(opened(chosen), 13), opened(chosen).digest()
    for part in ("train", "valid"):
        for number, path in enumerate(sorted((photos / part / "cat").iterdir(), reverse=True)):
            path.rename(path.with_name(f"new {number}.jpg"))
    loaders.prepare(chosen)  # the cache is still that of the pictures
    made, computed = extract(chosen)
    assert computed == []
    assert made.manifest.shards == manifest_of(chosen).shards
    assert "new 0.jpg" in " ".join(opened(chosen).names("valid", range(5)))
    assert opened(chosen).digest() == digest
    for ours, theirs in zip(epoch(opened(chosen), 13), before, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    maintenance.check(chosen.features.uri)
    (photos / "train" / "cat" / "new 0.jpg").rename(photos / "train" / "dog" / "new 0.jpg")  # another class
    assert "(1 with another label, e.g. train/dog/new 0.jpg)" in refusal(chosen)
    assert extract(chosen)[1] == []
    assert opened(chosen).digest() != digest


@pytest.mark.usefixtures("cached")
def test_another_class_is_another_data_set(chosen, photos):
    pictures.write(photos, {"train/ant": 1, "valid/ant": 1})
    assert "is of the classes cat, dog" in refusal(chosen)
    _, computed = extract(chosen)
    assert sorted(computed) == ["train/ant/0000.jpg", "valid/ant/0000.jpg"]  # others keep their features
    assert opened(chosen).info.classes == ("ant", "cat", "dog")


# ---------------------------------------------------------------------------------------------------- updates


@pytest.mark.usefixtures("cached")
def test_an_update_computes_what_has_changed(chosen, photos):
    (photos / "train" / "cat" / "0001.jpg").unlink()
    (photos / "train" / "dog" / "0002.jpg").write_bytes(pictures.jpeg(99))
    added = photos / "train" / "cat" / "0000a.jpg"  # which shifts all that come after it
    added.write_bytes(pictures.jpeg(98))
    _, computed = extract(chosen)
    assert sorted(computed) == ["train/cat/0000a.jpg", "train/dog/0002.jpg"]
    updated = epoch(opened(chosen), 13)
    fresh = configs.replace(chosen, features=chosen.features.uri + "-fresh")
    extract(fresh)
    for ours, theirs in zip(updated, epoch(opened(fresh), 13), strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    assert "2 rows of pictures that are gone" in maintenance.describe(chosen.features.uri)
    maintenance.check(chosen.features.uri)


def test_adding_one_percent_computes_one_percent(weights, tmp_path):
    photos = pictures.write(tmp_path / "many", {"train/a": 45, "train/b": 45, "valid/a": 5, "valid/b": 5})
    chosen = config(photos, tmp_path / "features", weights, tmp_path / "cache", shard_size=16)
    extract(chosen)
    (photos / "train" / "a" / "0.jpg").write_bytes(pictures.jpeg(555))
    _, computed = extract(chosen)
    assert len(computed) == 1


@pytest.mark.usefixtures("cached")
def test_a_shard_of_mostly_removed_pictures_goes(chosen, photos):
    before = manifest_of(chosen)
    for i in range(3):
        (photos / "train" / "cat" / f"000{i}.jpg").unlink()
    after, computed = extract(chosen)
    assert computed == ["train/cat/0003.jpg"]  # the last one alive of the first shard
    assert len(after.manifest.shards) == len(before.shards)
    pruned = maintenance.prune(chosen.features.uri)
    assert pruned.files == 3  # the shard, its receipt, the old index
    maintenance.check(chosen.features.uri)
    assert maintenance.prune(chosen.features.uri).files == 0


@pytest.mark.usefixtures("cached")
def test_other_settings_do_not_replace_a_cache_unasked(chosen):
    with pytest.raises(UserError, match=r"made otherwise \(--image-size: the cache has 32, asked for is 48\)"):
        extract(configs.replace(chosen, image_size=48))
    _, computed = extract(configs.replace(chosen, image_size=48, replace=True))
    assert len(computed) == 18
    assert opened(configs.replace(chosen, image_size=48)).info.height == 48


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.usefixtures("cached")
def test_a_half_written_manifest_is_no_cache(chosen):
    path = Path(chosen.features.uri) / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "manifest.json is damaged" in refusal(chosen)
    path.write_bytes(whole.replace(b'"rows": 4', b'"rows": 3', 1))
    assert "manifest.json is damaged" in refusal(chosen)
    path.write_bytes(whole.replace(b'"version": 3', b'"version": 4'))
    assert "is of version 4, and this software reads 3" in refusal(chosen)
    path.write_bytes(whole[:100])
    _, computed = extract(chosen)
    assert computed == []  # all shards have their receipts
    loaders.prepare(chosen)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "swapped"])
@pytest.mark.usefixtures("cached")
def test_check_finds_damaged_shards_and_the_job_mends_them(chosen, damage):
    root, shards = Path(chosen.features.uri), manifest_of(chosen).shards
    first, second = (root / shards[i].object for i in (0, 1))
    content = first.read_bytes()
    if damage == "flipped":
        first.write_bytes(content[:200] + bytes([content[200] ^ 4]) + content[201:])
    elif damage == "cut":
        first.write_bytes(content[:-7])
    elif damage == "swapped":
        first.write_bytes(second.read_bytes())
    else:
        first.unlink()
    with pytest.raises(UserError, match=r"1 of 6 shards are damaged: shards/\w+-\w+.safetensors.zst"):
        maintenance.check(str(root))
    with pytest.raises(UserError, match=r"is damaged|can't be read"):
        epoch(opened(chosen), 13)
    first.unlink(missing_ok=True)
    _, computed = extract(chosen)
    assert computed == [f"train/cat/000{i}.jpg" for i in range(4)]
    maintenance.check(str(root))
    epoch(opened(chosen), 13)


@pytest.mark.usefixtures("cached")
def test_a_damaged_index_is_refused(chosen):
    path = Path(chosen.features.uri) / manifest_of(chosen).index.object
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    with pytest.raises(UserError, match=r"index/\w+.parquet is damaged"):
        opened(configs.replace(chosen, data=""))


# ------------------------------------------------------------------------------------------------- bad pictures


def test_bad_pictures_are_left_out_and_listed(chosen, photos):
    bad = photos / "train" / "cat" / "0002.jpg"
    bad.write_bytes(b"no picture")
    chosen = configs.replace(chosen, max_bad_fraction=0.1)
    built, computed = extract(chosen)
    assert len(computed) == 18 and [picture.path for picture in built.manifest.bad] == ["train/cat/0002.jpg"]
    table = (Path(chosen.features.uri) / "quarantine.csv").read_bytes()
    assert table == b"path,reason\r\ntrain/cat/0002.jpg,not a picture: text\r\n"
    loader = opened(chosen)
    assert loader.info.train_size == 12 and loader.quarantine == built.manifest.bad
    uncached = opened(chosen, features="")
    assert list(uncached.quarantine) == list(built.manifest.bad)
    _, computed = extract(chosen)
    assert computed == []  # a bad picture is not tried again
    bad.write_bytes(pictures.jpeg(2))
    _, computed = extract(chosen)
    assert computed == ["train/cat/0002.jpg"] and opened(chosen).info.train_size == 13


def test_too_many_bad_pictures_end_the_job(chosen, photos):
    for i in range(4):  # a whole shard
        (photos / "train" / "cat" / f"000{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"4 of 18 pictures can't be decoded, more than --max-bad-fraction 0.1"):
        extract(configs.replace(chosen, max_bad_fraction=0.1))
    built, _ = extract(configs.replace(chosen, max_bad_fraction=0.5))
    assert len(built.manifest.shards) == 5 and opened(chosen).info.train_size == 9


# ------------------------------------------------------------------------------------------------------ looking


@pytest.mark.usefixtures("cached")
def test_describe_tells_what_a_cache_holds(chosen):
    text = maintenance.describe(chosen.features.uri)
    for line in (
        r"pictures             18: 13 training, 5 validation",
        r"classes              2: cat 10, dog 8",
        r"features             512x1x1, float16, 1 view(s) to learn from",
        r"model                vgg11 up to features.20, precision float32",
    ):
        assert line in text
    assert re.search(r"sample  +train/(cat|dog)/\d{4}.jpg \((cat|dog)\): mean", text)
    assert manifest_of(chosen).fingerprint.weights[:16] in text


def test_models_without_frozen_layers_have_no_features(chosen):
    for changes in ({"model": "scratch-cnn-photo", "weights": ""}, {"trainable_stages": 5}):
        with pytest.raises(UserError, match="has no frozen layers"):
            extract(configs.replace(chosen, **changes))


def test_unwritable_place(chosen, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        place = tmp_path / "file" / "features"
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        place = tmp_path / "locked" / "features"
    with pytest.raises(UserError, match=r"can't be written: .* --features"):
        extract(configs.replace(chosen, features=str(place)))


def test_pictures_are_looked_for_before_weights_are_downloaded(chosen, monkeypatch):
    """A wrong path costs no half gigabyte."""
    opened = lambda _: pytest.fail("the weights are opened")  # noqa: E731
    monkeypatch.setattr("cvdist.features.fingerprint.for_extraction", opened)
    with pytest.raises(UserError, match="--data"):
        build.make_plan(feature_caches.extraction(configs.replace(chosen, data=f"{chosen.data.uri}-elsewhere")))
