"""The feature cache without Ray: what is written is what is read, what is stale is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import made_up_features
from cvdist import config as configs
from cvdist import loaders, models
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.data.dataset import Shuffle
from cvdist.distributed.ranks import RankInfo
from cvdist.errors import UserError
from cvdist.features import build, inspect, manifest, receipt, shard
from cvdist.features import open as opening
from cvdist.features.order import windowed
from cvdist.storage import Folder
from cvdist.tracking import NoTracker
from cvdist.training import setup
from cvdist.training.train import train as train_run
from tests import pictures
from tests.feature_caches import CPU, SIZE, computing, config, extract, extraction, write_weights

COUNTS = {"train/cat": 7, "train/dog": 6, "valid/cat": 3, "valid/dog": 2}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "vgg11.pth")


@pytest.fixture
def photos(tmp_path):
    return pictures.write(tmp_path / "photos", COUNTS)


@pytest.fixture
def chosen(photos, weights, tmp_path):
    return config(photos, tmp_path / "features", weights, tmp_path / "cache")


def opened(chosen, **changes):
    chosen = configs.replace(chosen, **changes)
    loaders.prepare(chosen)
    return loaders.open_loader(chosen, CPU)


def epoch(loader, batch_size=4, *, number=1, rank=0, world=1, shuffle=None, position=0):
    order = loader.epoch_order(batch_size, 0, number, shuffle or loader.shuffle(world))
    return list(loader.train_batches(order, rank, world, position))


# --------------------------------------------------------------------------------------------------- the format


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    views=st.integers(1, 3),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from(sorted(shard.DTYPES)),
    names=st.lists(st.text(max_size=8), min_size=9, max_size=9),
)
def test_a_shard_reads_back_as_it_was_written(tmp_path_factory, rows, views, shape, dtype, names):
    features = torch.randn(rows, views, *shape).to(shard.DTYPES[dtype])
    labels = list(range(rows))
    packed = shard.pack(features, labels, names[:rows])
    raw = shard.unpack(
        packed.content, size=packed.raw_bytes, sha256=packed.sha256, raw_sha256=packed.raw_sha256
    )
    path = tmp_path_factory.mktemp("shard") / "some.safetensors"
    path.write_bytes(raw)
    assert torch.equal(shard.map_features(path), features)
    assert shard.read_labels_and_ids(raw) == (labels, names[:rows])
    assert shard.matches(path, size=packed.raw_bytes, raw_sha256=packed.raw_sha256)


def test_the_format_needs_nothing_of_ours(chosen):
    """Read a cache with json, zstd and numpy alone, by what docs/feature-format.md says."""
    import pyarrow as pa

    extract(chosen)
    root = Path(chosen.features.uri)
    about = json.loads((root / "manifest.json").read_text())
    assert (about["format"], about["version"], about["classes"]) == ("cvdist-features", 1, ["cat", "dog"])
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
    frozen = models.build_frozen(chosen.model).module
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


@pytest.mark.parametrize("dtype", sorted(shard.DTYPES))
def test_every_dtype_holds_the_features_to_its_precision(chosen, dtype):
    extract(configs.replace(chosen, features_dtype=dtype))
    (batch,) = opened(chosen).valid_batches(0, 1, 5)
    extract(configs.replace(chosen, features_dtype="float32", features=chosen.features.uri + "-32"))
    (exact,) = opened(chosen, features=chosen.features.uri + "-32").valid_batches(0, 1, 5)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    torch.testing.assert_close(batch.images, exact.images, rtol=tolerance, atol=1e-6)


def test_values_beyond_float16_are_refused(chosen, tmp_path):
    large = write_weights(tmp_path / "large.pth", scale=1e8)
    with pytest.raises(UserError, match=r"float16 can't hold the features of train/cat/0000\.jpg"):
        extract(configs.replace(chosen, weights=str(large)))
    extract(configs.replace(chosen, weights=str(large), features_dtype="bfloat16"))


def test_the_middle_of_the_network_can_be_cached(chosen):
    chosen = configs.replace(chosen, trainable_blocks=2)
    built, _ = extract(chosen)
    assert built.manifest.feature_shape == (256, 4, 4) and built.manifest.fingerprint.cut == "features.10"
    assert epoch(opened(chosen))[0].images.shape == (4, 256, 4, 4)


# ----------------------------------------------------------------------------------------- every sample, once


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A cache of 23 + 9 made-up pictures in shards of four, its features by path, and a loader maker."""
    root = tmp_path_factory.mktemp("made-up")
    made = made_up_features.write(root / "features", 23, 9, shape=(40,), shard_size=4, views=3)
    return made, made_up_features.everything(made, root / "features"), root


def loader_of(made_up, window=0, views=1):
    _, _, root = made_up
    limit = 0.0
    if window:
        largest = max(entry.raw_bytes for entry in made_up[0].shards)
        limit = (3 * window * largest + 10) / 1e9
    flips = {"horizontal_flip": 0.5} if views > 1 else {}
    chosen = config("", root / "features", Path("unused"), root / f"cache-{window}", local_cache_gb=limit)
    chosen = configs.replace(chosen, views=views)
    loader = opening.load(chosen, CPU, 1)
    assert loader.shuffle(2) == (Shuffle(2, window) if window else Shuffle()), flips
    return loader


@settings(deadline=None, max_examples=40)
@given(
    batch_size=st.integers(1, 25),
    world=st.integers(1, 5),
    number=st.integers(1, 3),
    window=st.integers(0, 2),
    views=st.integers(1, 3),
)
def test_all_workers_together_see_each_sample_once(made_up, batch_size, world, number, window, views):
    _, features, _ = made_up
    loader = loader_of(made_up, window, views)
    shares = [epoch(loader, batch_size, number=number, rank=r, world=world) for r in range(world)]
    assert len({len(share) for share in shares}) == 1  # the same number of steps for all
    seen = torch.cat([batch.indices for share in shares for batch in share]).tolist()
    assert sorted(seen) == list(range(23))
    for batches in zip(*shares, strict=True):
        assert sum(len(batch.labels) for batch in batches) == batches[0].global_size
        for batch in batches:
            paths = loader.names("train", batch.indices.tolist())
            assert batch.labels.tolist() == [int(path.split("/")[1] == "dog") for path in paths]
            for path, row in zip(paths, batch.images, strict=True):
                assert any(torch.equal(row, view.float()) for view in features[path][:views])
    valid = [batch for rank in range(world) for batch in loader.valid_batches(rank, world, batch_size)]
    assert sorted(torch.cat([batch.indices for batch in valid]).tolist()) == list(range(9))
    for batch in valid:
        for path, row in zip(loader.names("valid", batch.indices.tolist()), batch.images, strict=True):
            assert torch.equal(row, features[path][0].float())


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    batch_size=st.integers(1, 20),
    streams=st.integers(1, 5),
    window=st.integers(1, 4),
    now=st.integers(1, 5),
    data=st.data(),
)
def test_windowed_order_is_a_permutation_also_after_a_change_of_workers(
    sizes, batch_size, streams, window, now, data
):
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    order = windowed(numbers, batch_size, seed=1, epoch=2, streams=streams, window=window)
    again = windowed(numbers, batch_size, seed=1, epoch=2, streams=streams, window=window)
    assert torch.equal(order.order, again.order)
    step = data.draw(st.integers(0, order.steps()))
    position = min(step * batch_size, order.size)
    before = order.order[:position].tolist()
    after = [
        i for rank in range(now) for s in order.local_batches(rank, now, position) for i in s.indices.tolist()
    ]
    assert sorted(before + after) == list(range(len(numbers)))


def test_windowed_order_reads_each_shard_on_one_worker_and_in_one_window():
    numbers = np.repeat(np.arange(40), 25)
    order = windowed(numbers, 64, seed=0, epoch=1, streams=4, window=3)
    where = []
    for rank in range(4):
        mine = np.concatenate([numbers[share.indices] for share in order.local_batches(rank, 4)])
        where.append(set(mine.tolist()))
        assert len(where[-1]) <= 12  # ten, and what is cut at the ends
        # Never more than a window of shards within as many samples as it holds, wherever one looks.
        for start in range(0, len(mine), 75):
            assert len(set(mine[start : start + 75].tolist())) <= 2 * 3
    assert sum(map(len, where)) <= 40 + 3  # a shard is shared where the line is cut
    other = windowed(numbers, 64, seed=0, epoch=2, streams=4, window=3)
    assert not torch.equal(order.order, other.order)


def test_epochs_draw_all_views_and_validation_the_first(made_up):
    _, features, _ = made_up
    loader = loader_of(made_up, views=3)
    drawn = []
    for number in range(1, 12):
        for batch in epoch(loader, 23, number=number):
            for path, row in zip(loader.names("train", batch.indices.tolist()), batch.images, strict=True):
                drawn.append(next(v for v in range(3) if torch.equal(row, features[path][v].float())))
    counts = np.bincount(drawn, minlength=3)
    assert counts.sum() == 11 * 23 and counts.min() > 50
    first, again = epoch(loader, 23, number=1), epoch(loader, 23, number=1)
    assert torch.equal(first[0].images, again[0].images)


# ---------------------------------------------------------------------------------------- training from it


def train(chosen, tmp_path, name):
    worker = Worker(RankInfo(), CheckpointStore.at(str(tmp_path / name)))
    run = setup.build_run(chosen, worker, NoTracker())
    train_run(run)
    return run


def test_training_from_a_cache_is_training(chosen, tmp_path):
    """The same losses and counts as without a cache, and a model that takes pictures."""
    chosen = configs.replace(chosen, features_dtype="float32", dropout=0.0, epochs=2, lr=0.01)
    extract(chosen)
    cached = train(chosen, tmp_path, "cached")
    uncached = train(configs.replace(chosen, features=""), tmp_path, "uncached")
    for ours, theirs in zip(cached.progress.history, uncached.progress.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
        assert (ours.train_correct, ours.valid_correct) == (theirs.train_correct, theirs.valid_correct)
    for ours, theirs in zip(cached.model.parameters(), uncached.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    (batch,) = uncached.loader.valid_batches(0, 1, 5)
    (features,) = cached.loader.valid_batches(0, 1, 5)
    cached.model.eval()
    scores = cached.trained(features.images)[features.indices.argsort()]
    torch.testing.assert_close(cached.model(batch.images), scores, rtol=1e-3, atol=1e-4)


def test_a_stopped_windowed_epoch_goes_on_as_it_began(chosen, tmp_path, monkeypatch):
    """Also where the cache fits the node in the meantime."""
    extract(chosen)
    largest = max(s.raw_bytes for s in manifest.read(Folder.open(chosen.features.uri, "")).shards)
    small = configs.replace(
        chosen, local_cache_gb=3 * largest / 1e9, checkpoint_every=2, dropout=0.0, batch_size=3
    )
    whole = train(configs.replace(small, checkpoint_every=0), tmp_path, "whole")
    assert whole.progress.shuffle == Shuffle(1, 1)

    class Stopped(Exception):
        pass

    def stop(self, name, *rest):
        save(self, name, *rest)
        self.wait_for_uploads()
        if name.endswith("000002"):
            raise Stopped

    save = Worker.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "save_checkpoint", stop)
        with pytest.raises(Stopped):
            train(small, tmp_path, "stopped")
    large = configs.replace(small, local_cache_gb=0.0)
    resumed = train(large, tmp_path, "stopped")
    assert resumed.resumed_at == "epoch 1, sample 6"
    assert resumed.progress.history[0].train_loss == pytest.approx(whole.progress.history[0].train_loss)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_moving_average_from_a_cache(chosen, tmp_path):
    extract(chosen)
    run = train(configs.replace(chosen, model_ema_decay=0.5), tmp_path, "average")
    assert run.best.total == 5 and run.evaluated_model()(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 2)


# -------------------------------------------------------------------------------------------------- freshness


def refusal(chosen, **changes):
    with pytest.raises(UserError) as error:
        loaders.prepare(configs.replace(chosen, **changes))
    text = str(error.value)
    assert "\n" not in text and "--features" in text
    return text


def test_a_cache_made_otherwise_is_refused(chosen, tmp_path):
    extract(chosen)
    other = write_weights(tmp_path / "other.pth", seed=1)
    assert "--weights (SHA-256 of the frozen layers): the cache has" in refusal(chosen, weights=str(other))
    assert "--image-size: the cache has 32, asked for is 64" in refusal(chosen, image_size=64)
    assert "--resize: the cache has squash, asked for is crop" in refusal(chosen, resize="crop")
    assert "last frozen layer): the cache has features.20, asked for is features.15" in refusal(
        chosen, trainable_blocks=1
    )
    assert "--weights-preprocessing (mean)" in refusal(chosen, weights_preprocessing="vgg-features")
    assert "this run asks for augmentation" in refusal(chosen, rotation=5.0)
    assert "--views 2" in refusal(chosen, views=2)
    assert "has no manifest.json" in refusal(chosen, features=str(tmp_path / "nothing"))


def test_the_same_weights_in_another_file_are_the_same(chosen, tmp_path):
    extract(chosen)
    whole = torch.load(chosen.model.weights, weights_only=True) | {
        f"classifier.{i}.{kind}": torch.ones(shape)
        for i, (rows, columns) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items()
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    }
    torch.save(whole, tmp_path / "whole.pth")
    loaders.prepare(configs.replace(chosen, weights=str(tmp_path / "whole.pth")))


def test_pictures_that_changed_are_named(chosen, photos):
    extract(chosen)
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


def test_a_copy_of_the_pictures_elsewhere_is_the_same(chosen, photos, tmp_path):
    extract(chosen)
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    loaders.prepare(configs.replace(chosen, data=str(tmp_path / "copy")))


def test_another_class_is_another_data_set(chosen, photos):
    extract(chosen)
    pictures.write(photos, {"train/ant": 1, "valid/ant": 1})
    assert "is of the classes cat, dog" in refusal(chosen)
    _, computed = extract(chosen)
    assert len(computed) == 20  # all labels have another number now
    assert opened(chosen).info.classes == ("ant", "cat", "dog")


# ---------------------------------------------------------------------------------------------------- updates


def test_the_same_command_again_computes_nothing(chosen):
    first, computed = extract(chosen)
    assert len(computed) == 18
    second, computed = extract(chosen)
    assert computed == [] and second.manifest == first.manifest


def test_an_update_computes_what_has_changed(chosen, photos):
    extract(chosen)
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
    assert "2 rows of pictures that are gone" in inspect.describe(chosen.features.uri)
    inspect.check(chosen.features.uri)


def test_adding_one_percent_computes_one_percent(weights, tmp_path):
    photos = pictures.write(tmp_path / "many", {"train/a": 100, "train/b": 80, "valid/a": 10, "valid/b": 10})
    chosen = config(photos, tmp_path / "features", weights, tmp_path / "cache", shard_size=16)
    extract(chosen)
    for name in ("0", "zz"):
        (photos / "train" / "a" / f"{name}.jpg").write_bytes(pictures.jpeg(555))
    _, computed = extract(chosen)
    assert len(computed) == 2


def test_a_shard_of_mostly_removed_pictures_goes(chosen, photos):
    before, _ = extract(chosen)
    for i in range(3):
        (photos / "train" / "cat" / f"000{i}.jpg").unlink()
    after, computed = extract(chosen)
    assert computed == ["train/cat/0003.jpg"]  # the last one alive of the first shard
    assert len(after.manifest.shards) == len(before.manifest.shards)
    pruned = inspect.prune(chosen.features.uri)
    assert pruned.files == 3  # the shard, its receipt, the old index
    inspect.check(chosen.features.uri)
    assert inspect.prune(chosen.features.uri).files == 0


def test_other_settings_do_not_replace_a_cache_unasked(chosen):
    extract(chosen)
    with pytest.raises(UserError, match=r"made otherwise \(--image-size: the cache has 32, asked for is 48\)"):
        extract(configs.replace(chosen, image_size=48))
    _, computed = extract(configs.replace(chosen, image_size=48, replace=True))
    assert len(computed) == 18
    assert opened(configs.replace(chosen, image_size=48)).info.height == 48


# ------------------------------------------------------------------------------------------------ interruptions


class Killed(Exception):
    pass


def test_a_killed_extraction_keeps_its_finished_shards(chosen):
    plan = build.make_plan(extraction(chosen))
    assert len(plan.work) == 6

    def compute(left):
        for count, one in enumerate(computing(chosen, plan, [])(left)):
            if count == 3:
                raise Killed
            yield one

    with pytest.raises(Killed):
        build.build(extraction(chosen), plan, compute)
    refusal(chosen)  # what has no manifest is no cache
    again = build.make_plan(extraction(chosen))
    assert len(again.done) == 4 and len(again.left) == 2  # the fourth shard was finished as well
    _, computed = extract(chosen)
    assert len(computed) == sum(len(work.paths) for work in again.left)
    inspect.check(chosen.features.uri)


def test_two_extractions_at_once_into_one_place(chosen):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(extract, [chosen, chosen]))
    assert both[0][0].manifest.index == both[1][0].manifest.index
    inspect.check(chosen.features.uri)
    assert len(epoch(opened(chosen), 13)) == 1


def test_a_half_written_manifest_is_no_cache(chosen):
    extract(chosen)
    path = Path(chosen.features.uri) / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "manifest.json is damaged" in refusal(chosen)
    path.write_bytes(whole.replace(b'"rows": 4', b'"rows": 3', 1))
    assert "manifest.json is damaged" in refusal(chosen)
    path.write_bytes(whole.replace(b'"version": 1', b'"version": 2'))
    assert "is of version 2, and this software reads 1" in refusal(chosen)
    path.write_bytes(whole[:100])
    _, computed = extract(chosen)
    assert computed == []  # all shards have their receipts
    loaders.prepare(chosen)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "swapped"])
def test_check_finds_damaged_shards_and_the_job_mends_them(chosen, damage):
    built, _ = extract(chosen)
    root = Path(chosen.features.uri)
    first, second = (root / built.manifest.shards[i].object for i in (0, 1))
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
        inspect.check(str(root))
    with pytest.raises(UserError, match=r"is damaged|can't be read"):
        epoch(opened(chosen), 13)
    first.unlink(missing_ok=True)
    _, computed = extract(chosen)
    assert computed == [f"train/cat/000{i}.jpg" for i in range(4)]
    inspect.check(str(root))
    epoch(opened(chosen), 13)


def test_a_damaged_index_is_refused(chosen):
    built, _ = extract(chosen)
    path = Path(chosen.features.uri) / built.manifest.index.object
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    with pytest.raises(UserError, match=r"index/\w+.parquet is damaged"):
        opened(configs.replace(chosen, data=""))


def test_receipts_survive_nonsense():
    assert receipt.parse(b"") is None and receipt.parse(b"{}") is None and receipt.parse(b"[1]") is None


# ------------------------------------------------------------------------------------------------- bad pictures


def test_bad_pictures_are_left_out_and_listed(chosen, photos):
    bad = photos / "train" / "cat" / "0002.jpg"
    bad.write_bytes(b"no picture")
    chosen = configs.replace(chosen, max_bad_fraction=0.1)
    built, computed = extract(chosen)
    assert len(computed) == 18 and [picture.path for picture in built.manifest.bad] == ["train/cat/0002.jpg"]
    table = (Path(chosen.features.uri) / "quarantine.csv").read_bytes()
    assert table == b"path,reason\r\ntrain/cat/0002.jpg,not a picture of any known kind\r\n"
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


# ------------------------------------------------------------------------------------------------------- views


def test_views_are_the_augmented_pictures(chosen):
    chosen = configs.replace(chosen, horizontal_flip=1.0, views=2, features_dtype="float32")
    built, _ = extract(chosen)
    shards = {s.views for s in built.manifest.shards}
    assert shards == {2, 1}  # one for those to validate on
    features = made_up_features.everything(built.manifest, chosen.features.uri)
    frozen, normal = models.build_frozen(chosen.model).module, models.preprocessing(chosen.model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (normal.mean, normal.std))
    loader = opened(chosen)
    pixels, _ = loader.pictures("train", range(13))
    for path, picture in zip(loader.names("train", range(13)), pixels, strict=True):
        plain = (picture[None] / 255 - mean) / std
        torch.testing.assert_close(features[path][:1], frozen(plain), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[path][1:], frozen(plain.flip(-1)), rtol=1e-4, atol=1e-5)


def test_views_and_recipes_have_to_agree(chosen):
    flips = configs.replace(chosen, horizontal_flip=0.5, rotation=10.0)
    built, _ = extract(flips)
    assert built.manifest.fingerprint.views == 4  # the default of a recipe that augments
    assert "another augmentation (horizontal_flip 0.5 rotation 10 smallest_crop 1)" in refusal(
        flips, rotation=5.0
    )
    assert "4 views of each training picture" in opened(flips).note
    assert "4 views of each training picture" in opened(chosen).note  # a recipe without takes what there is
    assert "views of each" not in opened(configs.replace(chosen, views=1)).note  # the pictures as they are


def test_views_differ_without_naming_an_augmentation(chosen):
    named = configs.replace(chosen, horizontal_flip=0.5, rotation=10.0, views=3)
    one = extract(configs.replace(chosen, views=3))[0].manifest
    assert one.fingerprint == extract(named)[0].manifest.fingerprint
    assert one.fingerprint.views == 3 and one.fingerprint.augmentation is not None
    features = made_up_features.everything(one, chosen.features.uri)
    assert all(not torch.equal(*pair) for f in features.values() if len(f) > 1 for pair in pairwise(f))


def test_views_do_not_depend_on_how_the_data_is_cut(chosen):
    """The same picture in another shard of another extraction has the same views."""
    flips = configs.replace(chosen, rotation=10.0, views=3, features_dtype="float32")
    one = extract(flips)[0].manifest
    other = configs.replace(flips, shard_size=7, features=flips.features.uri + "2")
    two = extract(other)[0].manifest
    mine = made_up_features.everything(one, flips.features.uri)
    theirs = made_up_features.everything(two, other.features.uri)
    assert mine.keys() == theirs.keys()
    for path, features in mine.items():
        torch.testing.assert_close(features, theirs[path], rtol=1e-4, atol=1e-5)
        views = [features[i] for i in range(len(features))]
        assert all(not torch.equal(a, b) for a, b in pairwise(views))


# ------------------------------------------------------------------------------------------------------ looking


def test_describe_tells_what_a_cache_holds(chosen):
    built, _ = extract(chosen)
    text = inspect.describe(chosen.features.uri)
    for line in (
        r"pictures             18: 13 training, 5 validation",
        r"classes              2: cat 10, dog 8",
        r"features             512x1x1, float16, 1 view(s) to learn from",
        r"model                vgg11 up to features.20, precision float32",
        r"train/cat/0000.jpg (cat): mean",
    ):
        assert line in text
    assert built.manifest.fingerprint.weights[:16] in text


def test_no_secret_in_a_manifest(chosen):
    made = manifest.dump(dataclasses.replace(extract(chosen)[0].manifest, source="x")).decode()
    assert "AWS" not in made and "secret" not in made


def test_models_without_frozen_layers_have_no_features(chosen):
    for changes in ({"model": "scratch-cnn-photo", "weights": ""}, {"trainable_blocks": 5}):
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
