"""A comparison of two networks, from pictures to the command that trains the better one."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from tests.helpers import feature_caches, pictures
from tests.helpers.jobs import call, the_error
from tests.integration.test_any_network import write_weights

COUNTS = {"train/a": 16, "train/b": 14, "valid/a": 8, "valid/b": 7}


def test_from_pictures_to_the_command_that_trains_the_best(tmp_path):
    photos = pictures.write(tmp_path / "pictures", COUNTS)
    (tmp_path / "weights").mkdir()
    names = ["resnet18", "squeezenet1_1"]
    for name in names:
        write_weights(tmp_path / "weights" / f"{name}-random.pth", name)
    words = ["--data", photos, "--models", ",".join(names), "--weights-dir", tmp_path / "weights"]
    words += ["--image-size", "64", "--runtime", "inline", "--device", "cpu", "--precision", "float32"]
    words += ["--finalists", "1"]
    place = {"storage": tmp_path / "runs", "CVDIST_CACHE": str(tmp_path / "cache")}

    done = call("probe", *words, **place)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"45 of 45 pictures to compute", done.stderr)) == 2
    rows = {
        row.split()[0]: row.split()
        for row in done.stdout.splitlines()
        if row.startswith(("  resnet", "  squeeze"))
    }
    assert sorted(rows) == names
    assert sorted(row[1] == "-" for row in rows.values()) == [False, True]  # one finalist
    assert rows["resnet18"][-2:] == ["11,177,538", "0.15"]  # of 1.81 at 224 pixels

    # Logged: one run with the metrics, the table and the figure.
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])[0]
    assert run.info.status == "FINISHED" and run.data.tags["cvdist.kind"] == "probe"
    table = download_artifacts(
        run_id=run.info.run_id, artifact_path="networks.csv", tracking_uri=client.tracking_uri
    )
    with Path(table).open() as file:
        measured = {row["network"]: row for row in csv.DictReader(file)}
    for name in names:
        assert run.data.metrics[f"{name}/ridge_correct"] == int(measured[name]["ridge_correct"]) <= 15
        assert measured[name]["left_out_total"] == "30" and float(measured[name]["pictures_per_second"]) > 0
    assert any(
        one.path.endswith("accuracy_by_cost.png") for one in client.list_artifacts(run.info.run_id, "figures")
    )

    # Again: the caches are found.
    again = call("probe", *words, "--tracking", "none", **place)
    assert again.returncode == 0 and "to compute" not in again.stderr
    assert again.stderr.count("no picture has changed since the cache was written") == 2

    # As it is printed.
    command = shlex.split(again.stdout.splitlines()[-1].removeprefix("next: "))
    assert command[1:4] == ["jobs/train.py", "transfer-features", "--model"]
    trained = call("train", *command[2:], **place)
    assert trained.returncode == 0, trained.stderr
    best = next(row for name, row in rows.items() if name == command[4])
    if best[1] != "-":
        assert f"best accuracy  {best[1]} {best[2]} by logistic regression" in trained.stdout


def test_a_file_of_convolutions_gives_maps_and_a_cache_of_other_settings_is_refused(tmp_path):
    photos = pictures.write(tmp_path / "pictures", COUNTS)
    weights = feature_caches.write_weights(tmp_path / "convolutions.pth")
    words = ["--data", photos, "--image-size", "32", "--runtime", "inline", "--tracking", "none"]
    words += ["--models", f"vgg11:{weights}", "--features", tmp_path / "features", "--finalists", "0"]
    place = {"storage": tmp_path / "runs", "CVDIST_CACHE": str(tmp_path / "cache")}
    done = call("probe", *words, **place)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert "--features-at maps" in command and f"--features {tmp_path}/features/vgg11-convolutions" in command
    done = call("probe", *words, "--resize", "squash", **place)
    assert "vgg11-convolutions holds features that were made otherwise (--resize" in the_error(done)
