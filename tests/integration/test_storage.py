"""Object storage: a real S3 server on this machine."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import quote

import pytest
import torch
from pyarrow import fs as arrow

from cvdist import config as configs
from cvdist import loaders, log, models, slow_requests, storage
from cvdist.checkpoints.store import CheckpointStore
from cvdist.config import ModelConfig, PicturesConfig, TrainConfig
from cvdist.data.forms import look_unlabeled
from cvdist.data.images import versions
from cvdist.data.images.listing import list_pictures
from cvdist.errors import UserError
from cvdist.models import weights
from cvdist.prediction.pictures import find_pictures
from tests.cluster.harness import FaultProxy
from tests.helpers import pictures
from tests.helpers.checkpoints import add, checkpoint
from tests.helpers.feature_caches import write_weights
from tests.helpers.jobs import call, the_error, user_error


def upload(folder: Path, uri: str) -> str:
    filesystem, path = storage.locate(uri)
    arrow.copy_files(str(folder), path, destination_filesystem=filesystem)
    return uri


def test_listing_says_what_is_there_wherever_it_is(bucket, tmp_path):
    root = pictures.write(tmp_path / "some", {"a/b c": 2, "ü": 1})
    uri = upload(root, f"{bucket}/listing")
    wanted = {"a/b c/0000.jpg", "a/b c/0001.jpg", "ü/0000.jpg"}
    for place in (str(root), f"{root}/", f"file://{root}", uri, f"{uri}/"):
        entries = {
            one["path"]: one for batch in storage.list_entries(place, "--data") for one in batch.to_pylist()
        }
        assert {path for path, one in entries.items() if not one["is_folder"]} == wanted
        for path in wanted:
            assert entries[path]["size"] == (root / path).stat().st_size and entries[path]["modified"]
    filesystem, path = storage.locate(f"{uri}/a/b c/0001.jpg")
    assert storage.read(filesystem, path) == (root / "a/b c/0001.jpg").read_bytes()


@pytest.mark.parametrize("size", [7, 10_000])
def test_what_is_deleted_while_it_is_read_is_not_there(bucket, size):
    """pyarrow asks for an object's size first, and calls an object that is gone by then something else."""
    filesystem, path = storage.locate(f"{bucket}/deleted")
    storage.write(filesystem, path, bytes(size))

    def open_and_delete(path, **options):
        stream = filesystem.open_input_stream(path, **options)
        filesystem.delete_file(path)
        return stream

    server = Mock(open_input_stream=open_and_delete, get_file_info=filesystem.get_file_info)
    with pytest.raises(FileNotFoundError):
        storage.read(server, path)


def test_folders_mean_the_same_in_a_bucket(bucket, tmp_path, caplog):
    counts = {
        "Training/a": 3,
        "Training/10": 2,
        "Training/9": 1,
        "test_set/a": 1,
        "test_set/10/x": 1,
        "valid-0": 1,
    }
    root = pictures.write(tmp_path / "some", {**counts, "Training/__MACOSX": 1, "test_set/.cache": 1})
    listings = [
        list_pictures(PicturesConfig(uri=place)) for place in (str(root), upload(root, f"{bucket}/layout"))
    ]
    assert listings[0].classes == listings[1].classes == ("9", "10", "a")
    first, second = (one.table.drop_columns("modified") for one in listings)
    assert first.equals(second) and len(first) == 8
    assert caplog.text.count("classes that test_set has no pictures of: 9 (1)") == 2


def test_objects_are_known_by_their_etags(bucket, tmp_path, monkeypatch):
    root = pictures.write(tmp_path / "some", {"a": 2, "b": 1})
    first, copy = (upload(root, f"{bucket}/etags-{i}") for i in (1, 2))

    def version(uri):
        monkeypatch.setattr(storage, "read", None)  # contents are not asked for
        return versions.digest(versions.with_versions(look_unlabeled(uri), uri, tmp_path / "cache"))

    before = version(first)
    assert version(copy) == before
    filesystem, path = storage.locate(copy)
    content = bytearray((root / "a" / "0001.jpg").read_bytes())
    content[-1] ^= 1
    storage.write(filesystem, f"{path}/a/0001.jpg", bytes(content))
    assert version(copy) != before


@pytest.mark.parametrize("cache_fraction", [0.5, 0.0], ids=["kept on the node", "decoded in each epoch"])
def test_pictures_in_a_bucket_are_those_in_a_folder(bucket, tmp_path, cache_fraction):
    root = pictures.write(tmp_path / "some", {"train/a": 40, "train/b": 30, "valid/a": 2, "valid/b": 2})
    uri = upload(root, f"{bucket}/pictures-{cache_fraction}")
    opened = []
    for place in (str(root), uri):
        settings = {"cache": str(tmp_path / "cache"), "cache_fraction": cache_fraction, "decode_workers": 2}
        chosen = configs.replace(TrainConfig(), dataset="images", data=place, image_size=16, **settings)
        loaders.prepare(chosen)
        opened.append(loaders.open_loader(chosen, torch.device("cpu")))
    assert opened[0].digest() == opened[1].digest()
    batches = [torch.cat([b.images for b in loader.valid_batches(0, 1, 3)]) for loader in opened]
    assert torch.equal(*batches)


def test_weights_in_a_bucket_are_brought_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "up").mkdir()
    write_weights(tmp_path / "up" / "some.pth")
    uri = upload(tmp_path / "up", f"{bucket}/weights") + "/some.pth"
    settings = ModelConfig(name="vgg11", weights=uri, weights_preprocessing="imagenet")
    model = models.skeleton(settings)
    first = weights.load(settings, model).origin
    monkeypatch.setattr(storage, "download", None)
    assert weights.load(settings, model).origin == first and first.source == uri


@pytest.mark.parametrize("name", ["a b", "a%20b", "100%", "a%2Fb", "a#b", "a?b", "a?b=c", "a+b", "é", "字"])
def test_names_are_taken_as_they_are(bucket, s3, tmp_path, name):
    """As by the tools of Amazon; only a file's URI is decoded, once."""
    secret = f"{s3['AWS_ACCESS_KEY_ID']}:{s3['AWS_SECRET_ACCESS_KEY']}"
    options = "?region=us-east-1&scheme=http&endpoint_override=" + s3["AWS_ENDPOINT_URL"].rpartition("/")[2]
    places = {
        f"{bucket}/names/{name}": f"s3://{secret}@{bucket.removeprefix('s3://')}/names/{name}{options}",
        f"{tmp_path}/{name}": f"file://{tmp_path}/{quote(name)}",
    }
    for uri, other in places.items():
        storage.Folder.open(uri, "--storage").write(f"{name}.txt", b"content")
        assert storage.Folder.open(other, "--storage").read(f"{name}.txt") == b"content"
        assert [
            path for batch in storage.list_entries(other, "--data") for path in batch["path"].to_pylist()
        ] == [f"{name}.txt"]
        filesystem, path = storage.locate(uri)
        assert path.endswith(f"/{name}")
        assert filesystem.get_file_info(f"{path}/{name}.txt").type == arrow.FileType.File
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_pictures_of_a_prediction_are_named_by_uris_patterns_and_lists(bucket, tmp_path):
    uri = upload(pictures.write(tmp_path / "some", {"a": 3, "b [x]": 1, "b/c": 2}), f"{bucket}/named 100%")
    (tmp_path / "list.txt").write_text(f"{uri}/a/0001.jpg\n\n{uri}/b/*/0000.jpg\n")
    wanted = {
        (f"{uri}/a/0002.jpg",): {"0002.jpg"},
        (f"{uri}/a/0002.jpg", f"{uri}/b [x]"): {"a/0002.jpg", "b [x]/0000.jpg"},
        (f"{uri}/**/000[01].jpg",): {
            "a/0000.jpg",
            "a/0001.jpg",
            "b [x]/0000.jpg",
            "b/c/0000.jpg",
            "b/c/0001.jpg",
        },
        (str(tmp_path / "list.txt"),): {"a/0001.jpg", "b/c/0000.jpg"},
    }
    for words, paths in wanted.items():
        found = find_pictures(words)
        assert set(found.table.column("path").to_pylist()) == paths
        filesystem, root = storage.locate(found.root)
        assert all(storage.is_file(filesystem, f"{root}/{path}") for path in paths)
    with pytest.raises(UserError, match="of one place, not of s3://bucket and this machine"):
        find_pictures([f"{uri}/a", str(tmp_path)])


def error_of(uri):
    text = user_error(lambda: list(storage.list_entries(uri, "--data")))
    assert text.startswith("--data s3://")
    return text


def test_wrong_credentials(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    text = error_of(f"{bucket}/x")
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy" in text
    assert "wrong" not in text
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "check AWS_ACCESS_KEY_ID" in error_of(f"{bucket}/x")


def test_what_waiting_can_not_help_is_no_reason_to_start_again(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    def error(uri):
        with pytest.raises(UserError) as caught:
            add(CheckpointStore.at(uri), checkpoint(1))
        return caught.value

    assert not error(f"{tmp_path}/file/run").transient
    monkeypatch.setattr(storage.Path, "mkdir", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    assert error(f"{tmp_path}/run").transient
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert not error(f"{bucket}/run").transient


def test_no_such_bucket_or_folder(bucket):
    for uri in ("s3://no-such-bucket/x", f"{bucket}/no/such/folder"):
        assert error_of(uri) == f"--data {uri} can't be read (there is no such file, folder or bucket)"


def test_a_server_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    began = time.monotonic()
    assert error_of(f"{bucket}/x").endswith("check AWS_ENDPOINT_URL and the network")
    assert time.monotonic() - began < 60


def test_throttled_requests_are_counted_with_the_time_that_they_cost(bucket, s3, monkeypatch, caplog):
    proxy = FaultProxy("127.0.0.1", s3["AWS_ENDPOINT_URL"].rpartition("//")[2])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(slow_requests, "LOG_SECONDS", 0)
    try:
        folder = storage.Folder.open(f"{bucket}/throttled", "--storage", patient=True)
        slow_requests.take()
        folder.write("quick", b"1")
        assert folder.find("absent") is None and not slow_requests.take()
        proxy.begin_to_refuse()
        end = threading.Timer(3.0, setattr, (proxy, "slow_down", False))
        end.start()
        began = time.monotonic()
        folder.write("late", b"2")  # tried again by the AWS SDK until it is taken
        seconds = time.monotonic() - began
        seen = slow_requests.take()
        assert len(seen) == 1 and 2.5 < seen[0] <= seconds and proxy.refused > 1
        assert (
            f"the storage took {log.duration(seconds)} for {bucket.removeprefix('s3://')}/throttled/late"
            in caplog.text
        )
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        proxy.begin_to_refuse()
        with pytest.raises(UserError, match="can't be written"):
            storage.Folder.open(f"{bucket}/throttled", "--storage").write("never", b"3")
        assert len(slow_requests.take()) == 1
        proxy.slow_down = False
        assert folder.read("late") == b"2"
    finally:
        proxy.close()


def test_no_secret_in_messages(monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert "secret" not in error_of("s3://key:secret@bucket/x?endpoint_override=127.0.0.1:9&scheme=http")


def test_a_job_that_may_not_read_its_data_says_so_in_one_line(s3, tmp_path):
    done = call(
        "train",
        *("dogs-cats-cnn", "--data", "s3://bucket/pictures", "--runtime", "inline", "--tracking", "none"),
        storage=tmp_path,
        **{**s3, "AWS_SECRET_ACCESS_KEY": "wrong", "CVDIST_CACHE": str(tmp_path / "cache")},
    )
    text = the_error(done)
    assert text.startswith("--data s3://bucket/pictures can't be read (") and "AWS_SECRET_ACCESS_KEY" in text
