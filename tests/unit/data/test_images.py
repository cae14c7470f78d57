"""Image folders: what is listed, what is refused, what is left out, and the batches that come of it."""

from __future__ import annotations

import csv
import gc
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import config as configs
from cvdist import loaders
from cvdist.config import TrainConfig, cache_folder
from cvdist.data.images import decode, store
from cvdist.data.images.loader import PixelFile
from cvdist.data.sampler import EpochOrder
from cvdist.errors import UserError
from cvdist.training import run_figures
from tests.helpers import pictures
from tests.helpers.jobs import user_error

CPU = torch.device("cpu")


def config(root, tmp_path, **changes):
    ours = {"dataset": "images", "data": str(root), "cache": str(tmp_path / "cache"), "image_size": 16}
    return configs.replace(TrainConfig(), **{**ours, "decode_workers": 1, **changes})


def opened(root, tmp_path, **changes):
    chosen = config(root, tmp_path, **changes)
    loaders.prepare(chosen)
    return loaders.open_loader(chosen, CPU)


def refused(root, tmp_path, **changes):
    return user_error(opened, root, tmp_path, **changes).replace(str(root), "DIR")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures.write(tmp_path_factory.mktemp("pictures"), pictures.FOUR)


def epoch(loader, rank=0, world=1, *, batch_size=4, number=1, position=0):
    order = EpochOrder(loader.info.train_size, batch_size, seed=0, epoch=number)
    return list(loader.train_batches(order, rank, world, position))


# --------------------------------------------------------------------------------------------------- listing


def test_a_folder_with_a_split(folder, tmp_path):
    loader = opened(folder, tmp_path)
    info = loader.info
    assert (info.classes, info.train_size, info.valid_size) == (("cat", "dog"), 11, 5)
    assert (info.channels, info.height, info.width) == (3, 16, 16)
    labels = torch.cat([batch.labels for batch in loader.valid_batches(0, 1, 2)])
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1]
    paths = loader.names("train", range(11))
    images, names = loader.pictures(
        "train", [paths.index("train/cat/0000.jpg"), paths.index("train/dog/0004.jpg")]
    )
    assert names == ["cat", "dog"]
    expected = decode.decode((folder / "train" / "dog" / "0004.jpg").read_bytes(), 16, "squash")
    assert torch.equal(images[1].permute(1, 2, 0), expected)


def test_a_folder_without_a_split(tmp_path):
    root = pictures.write(tmp_path / "all", {"a": 10, "b": 20, "c": 5})
    loader = opened(root, tmp_path, valid_fraction=0.2)
    labels = torch.cat([batch.labels for batch in loader.valid_batches(0, 1, 100)])
    assert torch.bincount(labels).tolist() == [2, 4, 1] and loader.info.train_size == 28
    seen = [{i.numpy().tobytes() for i in loader.pictures(part, range(n))[0]} for part, n in
            (("train", 28), ("valid", 7))]  # fmt: skip
    assert len(seen[0] | seen[1]) == 35 and not seen[0] & seen[1]
    other = opened(root, tmp_path, valid_fraction=0.2, split_seed=1)
    assert other.digest() != loader.digest()
    assert opened(root, tmp_path, valid_fraction=0.2, seed=1).digest() == loader.digest()


@pytest.mark.parametrize("split", [True, False], ids=["split by folders", "split by --valid-fraction"])
def test_names_decide_nothing(tmp_path, split):
    made = {"train/a": 6, "train/b": 5, "valid/a": 3, "valid/b": 2} if split else {"a": 10, "b": 7}
    root = pictures.write(tmp_path / "all", made)
    before = opened(root, tmp_path)
    batches = epoch(before)
    for number, path in enumerate(sorted(root.rglob("*.jpg"), reverse=True)):
        path.rename(path.with_name(f"{number:04}.jpeg"))
    after = opened(root, tmp_path)
    assert after.digest() == before.digest() and after.info.mean == before.info.mean
    for ours, theirs in zip(epoch(after), batches, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    assert all(name.endswith(".jpeg") for name in after.names("train", range(after.info.train_size)))


def test_other_names_deeper_folders_and_other_files(tmp_path, caplog):
    root = pictures.write(
        tmp_path / "x", {"train/a/deep": 2, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 3}
    )
    (root / "train" / "a" / "README.txt").write_text("about")
    (root / "train" / ".DS_Store").write_text("")
    (root / "train" / "b" / "0000.jpg").rename(root / "train" / "b" / "0000.JPEG")
    (root / "__MACOSX").mkdir()
    caplog.set_level("INFO", "cvdist")
    info = opened(root, tmp_path).info
    assert (info.train_size, info.valid_size, info.classes) == (4, 2, ("a", "b"))
    for text in ("files that are no pictures by their names: 1", "pictures in no class folder, left out: 3"):
        assert text in caplog.text


def test_no_such_folder_and_no_such_scheme(tmp_path):
    text = "--data DIR can't be read (there is no such file, folder or bucket)"
    assert refused(tmp_path / "nowhere", tmp_path) == text
    assert refused("ftp://host/x", tmp_path).startswith("--data DIR: ")


# ------------------------------------------------------------------------------------------------- quarantine


def with_bad(tmp_path, bad=2, good=30):
    root = pictures.write(tmp_path / "some", {"a": good // 2, "b": good // 2})
    content = pictures.jpeg(0)
    damaged = [content[: len(content) // 2], b"", b"<html>"]
    for i in range(bad):
        (root / "a" / f"bad-{i}.jpg").write_bytes(damaged[i % 3])
    return root


def test_bad_pictures_are_left_out_and_listed(tmp_path):
    root = with_bad(tmp_path)
    loader = opened(root, tmp_path, max_bad_fraction=0.1)
    assert [picture.path for picture in loader.quarantine] == ["a/bad-0.jpg", "a/bad-1.jpg"]
    assert loader.quarantine[1].reason == "0 bytes"
    assert loader.info.train_size + loader.info.valid_size == 30
    # The others are where they belong, behind the gaps.
    images, _ = loader.pictures("train", range(loader.info.train_size))
    files = {decode.decode(path.read_bytes(), 16, "squash").numpy().tobytes() for path in root.glob("*/0*.jpg")}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in images} < files


def test_too_many_bad_pictures_end_the_job(tmp_path):
    root = with_bad(tmp_path)
    text = refused(root, tmp_path)
    assert text.startswith(
        "--data DIR: 2 of 32 pictures (6.25%) can't be decoded, more than --max-bad-fraction 0.001 allows, "
        "e.g. a/bad-0.jpg ("
    )
    (table,) = (tmp_path / "cache").glob("*/quarantine.csv")
    assert str(table) in text
    with table.open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["a/bad-0.jpg", "a/bad-1.jpg"]
    assert refused(root, tmp_path) == text  # from the copy that is there now
    opened(root, tmp_path, max_bad_fraction=2 / 32)


def test_a_class_that_is_all_bad(tmp_path):
    root = pictures.write(tmp_path / "some", {**pictures.FOUR, "train/dog": 1})
    (root / "train" / "dog" / "0000.jpg").write_bytes(b"")
    assert refused(root, tmp_path, max_bad_fraction=1.0) == (
        "--data DIR: no training picture of dog can be decoded"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    root = pictures.write(tmp_path / "some", pictures.FOUR)
    (root / "train" / "cat" / "0001.jpg").chmod(0)
    assert refused(root, tmp_path) == "--data DIR: train/cat/0001.jpg can't be read (Permission denied)"


# ------------------------------------------------------------------------------------------- the node's copy


def test_pictures_are_decoded_once(folder, tmp_path, monkeypatch):
    first = opened(folder, tmp_path)
    monkeypatch.setattr(store, "check_all", None)
    again = opened(folder, tmp_path)
    assert again.digest() == first.digest()


def test_a_copy_of_the_folder_is_not_decoded_again(folder, tmp_path, monkeypatch):
    first = opened(folder, tmp_path)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    monkeypatch.setattr(store, "check_all", None)
    assert opened(tmp_path / "copy", tmp_path).digest() == first.digest()


def test_a_changed_picture_is_noticed(tmp_path):
    root = pictures.write(tmp_path / "some", pictures.FOUR)
    before = opened(root, tmp_path)
    (root / "train" / "cat" / "0000.jpg").write_bytes(pictures.jpeg(77))
    after = opened(root, tmp_path)
    assert after.digest() != before.digest()
    now, then = (
        loader.pictures("train", [loader.names("train", range(11)).index("train/cat/0000.jpg")])[0]
        for loader in (after, before)
    )
    assert not torch.equal(now, then)


def test_other_settings_have_their_own_copy(folder, tmp_path):
    squash, crop = opened(folder, tmp_path), opened(folder, tmp_path, resize="crop")
    assert not torch.equal(squash.pictures("train", [0])[0], crop.pictures("train", [0])[0])
    assert opened(folder, tmp_path, image_size=20).pictures("train", [0])[0].shape == (1, 3, 20, 20)


def test_an_interrupted_copy_is_made_again(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(folder, tmp_path)
    with pytest.raises(UserError, match="has lost its copy of"):
        loaders.open_loader(config(folder, tmp_path), CPU)
    monkeypatch.undo()
    assert len(epoch(opened(folder, tmp_path))) == 3


def test_two_jobs_on_a_node_decode_once(folder, tmp_path, caplog):
    caplog.set_level("INFO", "cvdist")
    both = [threading.Thread(target=loaders.prepare, args=(config(folder, tmp_path),)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    messages = [record.getMessage() for record in caplog.records]
    assert sum("decoded 16 pictures" in message for message in messages) == 1


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    text = refused(folder, tmp_path, cache=str(tmp_path / "file"))
    assert text.startswith(f"--cache {tmp_path}/file can't be used (File exists): name another folder")


def test_the_cache_is_named_by_flag_or_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("CVDIST_CACHE", str(tmp_path / "variable"))
    assert cache_folder("") == tmp_path / "variable"
    assert cache_folder(str(tmp_path / "flag")) == tmp_path / "flag"


# --------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory):
    """Pixels kept on the disk."""
    return opened(folder, tmp_path_factory.mktemp("kept"), channels_last=False)


@pytest.fixture(scope="module")
def streamed(folder, tmp_path_factory):
    """No room on the disk: decoded in each epoch, by two processes."""
    tmp_path = tmp_path_factory.mktemp("streamed")
    loader = opened(folder, tmp_path, cache_fraction=0.0, decode_workers=2, channels_last=False)
    assert not list(tmp_path.glob("cache/*/pixels.u8"))
    return loader


def test_with_and_without_room_on_the_disk_the_batches_are_the_same(kept, streamed):
    assert kept.digest() == streamed.digest()
    torch.manual_seed(1)
    for number in (1, 2):
        for one, other in zip(epoch(kept, number=number), epoch(streamed, number=number), strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        valid = [torch.cat([b.images for b in loader.valid_batches(0, 1, 2)]) for loader in (kept, streamed)]
        assert torch.equal(*valid)
    assert torch.equal(kept.pictures("valid", [3, 1])[0], streamed.pictures("valid", [3, 1])[0])
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1), "reading data took numbers from the stream that dropout draws from"


def test_a_vanished_picture_in_a_later_epoch_is_named(tmp_path):
    root = pictures.write(tmp_path / "some", pictures.FOUR)
    loader = opened(root, tmp_path, cache_fraction=0.0)
    (root / "train" / "cat" / "0003.jpg").unlink()
    with pytest.raises(UserError, match=r"train/cat/0003.jpg can't be read \(No such file or directory\)"):
        epoch(loader)


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 13),
    world=st.integers(1, 4),
    position=st.integers(0, 10),
    number=st.integers(1, 3),
)
def test_all_workers_together_see_each_picture_once(kept, batch_size, world, position, number):
    shares = [
        epoch(kept, rank, world, batch_size=batch_size, number=number, position=position)
        for rank in range(world)
    ]
    seen = torch.cat([batch.indices for share in shares for batch in share]).tolist()
    order = EpochOrder(11, batch_size, seed=0, epoch=number).order
    assert sorted(seen) == sorted(order[position:].tolist())
    for batches in zip(*shares, strict=True):
        assert sum(len(batch.labels) for batch in batches) == batches[0].global_size
        for batch in batches:
            assert batch.images.shape == (len(batch.labels), 3, 16, 16)
            expected, names = kept.pictures("train", batch.indices.tolist())
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (kept.info.mean, kept.info.std))
            torch.testing.assert_close(batch.images, (expected / 255 - mean) / std, rtol=1e-4, atol=1e-5)
            assert names == [kept.info.classes[label] for label in batch.labels]
    valid = [batch for rank in range(world) for batch in kept.valid_batches(rank, world, batch_size)]
    assert torch.cat([batch.indices for batch in valid]).tolist() == list(range(5))


def test_statistics_are_those_of_the_training_pixels(kept):
    pixels = kept.pictures("train", range(11))[0].double() / 255
    assert kept.info.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert kept.info.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist(), abs=1e-4)


def test_normalization_of_pretrained_weights_replaces_them(folder, tmp_path):
    chosen = config(folder, tmp_path)
    loaders.prepare(chosen)
    loader = loaders.open_loader(chosen, CPU, normalization=((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    (batch,) = loader.valid_batches(0, 1, 5)
    pixels = loader.pictures("valid", range(5))[0] / 255
    for channel, (mean, std) in enumerate(((0.5, 0.1), (0.4, 0.2), (0.3, 0.3))):
        torch.testing.assert_close(batch.images[:, channel], (pixels[:, channel] - mean) / std)


def test_layout(folder, tmp_path):
    (batch,) = opened(folder, tmp_path, channels_last=True).valid_batches(0, 1, 5)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_validation_is_not_augmented(folder, tmp_path):
    plain = opened(folder, tmp_path)
    augmented = opened(
        folder, tmp_path, horizontal_flip=0.5, rotation=10.0, random_resized_crop=0.5, color_jitter=0.3
    )
    assert torch.equal(next(plain.valid_batches(0, 1, 5)).images, next(augmented.valid_batches(0, 1, 5)).images)
    assert not torch.equal(epoch(plain)[0].images, epoch(augmented)[0].images)


def test_memory_does_not_hold_the_pictures(tmp_path):
    """What a worker holds after an epoch over twenty thousand pictures: not their 60 MB."""
    path = tmp_path / "pixels.u8"
    stride = 32 * 32 * 3
    path.write_bytes(os.urandom(stride) * 20_000)
    source = PixelFile(path, 32, np.arange(20_000), pinned=False)
    rows = np.random.default_rng(0).permutation(20_000)

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in source.batches([rows[:100]]):
        pass
    before = resident()
    count = sum(len(batch) for batch in source.batches(rows[i : i + 100] for i in range(0, 20_000, 100)))
    assert count == 20_000 and resident() - before < 20 << 20


def test_the_figure_of_the_augmentation(folder, tmp_path):
    loader = opened(folder, tmp_path, horizontal_flip=0.5, rotation=10.0)
    figure = run_figures.augmentation(loader)()
    shown = [image.get_array() for image in figure.axes[0].images]
    assert len(shown) == 4 * 8  # eight pictures, and three epochs of each
    assert any((shown[i] != shown[8 + i]).any() for i in range(8))
    assert opened(folder, tmp_path).augmentation is None


def test_the_figure_of_mixtures_has_the_shares_of_both_labels(folder, tmp_path):
    loader = opened(folder, tmp_path, mixup_alpha=1.0)
    figure = run_figures.augmentation(loader)()
    shares = [loader.mixing.draw(number, 0).share for number in (1, 2, 3)]
    captions = {text.get_text() for text in figure.axes[0].texts}
    assert {f"{share:.0%} cat" for share in (*shares, *(1 - share for share in shares))} <= captions
    assert {f"{share:.0%} dog" for share in (*shares, *(1 - share for share in shares))} <= captions
    assert {"cat", "dog"} <= captions


def test_mixed_photographs_are_the_same_on_any_number_of_workers(folder, tmp_path):
    kinds = {"random_resized_crop": 0.3, "horizontal_flip": 0.5, "auto_augment": "ra", "random_erase": 0.5}
    loader = opened(folder, tmp_path, mixup_alpha=0.4, cutmix_alpha=1.0, **kinds)
    alone = epoch(loader)
    parts = [epoch(loader, rank, 3) for rank in range(3)]
    rest = epoch(loader, position=4)
    for number, batch in enumerate(alone):
        images = torch.cat([part[number].images for part in parts])
        torch.testing.assert_close(images, batch.images)
        assert torch.equal(torch.cat([part[number].labels for part in parts]), batch.labels)
        if number:
            assert torch.equal(rest[number - 1].images, batch.images)
    plain = epoch(opened(folder, tmp_path))
    assert not torch.equal(plain[0].images, alone[0].images)
