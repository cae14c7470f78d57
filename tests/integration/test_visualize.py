"""Figures of what saved models have learned, in a run's artifacts and in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from cvdist import config as configs
from cvdist import recipes, tracking
from cvdist.config import LookConfig, SavedModelConfig, VisualizeJobConfig
from cvdist.errors import UserError
from cvdist.jobs.train import train
from cvdist.jobs.visualize import visualize
from tests.helpers.jobs import call
from tests.helpers.pictures import FOUR, write

FIGURES = {
    *("filters/conv1.png", "filters/conv1.svg", "filters/conv2.png", "filters/forming.gif"),
    *("filters/conv1-before-after.png", "filters/conv2-before-after.png"),
    *(
        "activations/conv1.png",
        "activations/conv2.png",
        "top_activations/conv1.png",
        "top_activations/conv2.png",
    ),
    *("gradcam/right.png", "gradcam/wrong.png"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Storage of a run of two epochs, that was then continued for one more."""
    storage = tmp_path_factory.mktemp("runs")
    for epochs in (2, 3):
        config = configs.replace(
            recipes.find("digits-cnn"),
            name="seen",
            storage=str(storage),
            runtime="inline",
            system_metrics=False,
            epochs=epochs,
            batch_size=100,
            keep_checkpoints=1,
        )
        train(config)
    return storage


def artifacts_of(storage):
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("cvdist").experiment_id])
    folder = Path(client.get_run(found.info.run_id).info.artifact_uri.removeprefix("file://")) / "figures"
    return found, folder


def test_a_runs_artifacts_show_what_it_has_learned(trained):
    _, figures = artifacts_of(trained)
    there = {str(path.relative_to(figures)) for path in figures.rglob("*.*")}
    snapshots = {f"filters/conv1-epoch-{epoch:04}.png" for epoch in range(4)}
    assert there >= FIGURES | snapshots
    with Image.open(figures / "filters" / "forming.gif") as animation:
        assert animation.n_frames == 4  # of both attempts


def job(storage, source, **look):
    return visualize(
        VisualizeJobConfig(SavedModelConfig(source=source, storage=str(storage)), LookConfig(**look))
    )


def test_a_job_shows_a_runs_model(trained, tmp_path):
    found, figures = artifacts_of(trained)
    before = (figures / "top_activations" / "conv1.png").read_bytes()
    done = call(
        *("visualize", "seen", "--layers", "first", "--most-pictures", "60"),
        *("--output", tmp_path / "out"),
        storage=trained,
    )
    assert done.returncode == 0, done.stderr
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert names == {
        name for name in FIGURES if "conv2" not in name and not name.endswith(("after.png", "gif"))
    }
    assert "dead channels  none, over 60 pictures" in done.stdout
    assert found.info.run_id in done.stdout.splitlines()[-1]
    assert (figures / "top_activations" / "conv1.png").read_bytes() != before  # of other pictures


def test_a_job_shows_a_checkpoint_with_pictures_of_a_folder(trained, tmp_path):
    write(tmp_path / "pictures", FOUR)
    (tmp_path / "pictures" / "valid" / "cat" / "bad.jpg").write_bytes(b"no picture")
    shown = job(trained, f"{trained}/seen", data=str(tmp_path / "pictures"), output=str(tmp_path / "out"))
    assert shown.interpretation.seen == 5 and shown.run is None  # the validation part, without the bad one
    assert [reason.partition(":")[0] for reason in shown.bad] == ["valid/cat/bad.jpg"]
    assert (tmp_path / "out" / "gradcam" / "predicted.png").is_file()  # cats and dogs are no digits
    assert len(shown.files) == len(list((tmp_path / "out").rglob("*.*")))
    one = tmp_path / "pictures" / "train" / "dog" / "0000.jpg"
    assert job(trained, f"{trained}/seen", data=str(one), output=str(tmp_path / "one")).interpretation.seen == 1


@pytest.mark.parametrize(
    ("look", "says_why"),
    [
        ({"data": "bad.jpg"}, r"--data .*bad\.jpg: the picture can't be decoded \(.*not a picture: text"),
        ({"data": "folder"}, r"--data .*folder has no pictures"),
        ({"data": "absent"}, r"--data .*absent can't be read"),
        ({"layers": "conv3"}, r"--layers conv3: the model has no such convolution; it has 2: conv1, conv2"),
        ({"most_pictures": 0}, r"--most-pictures is 0: it takes 1 or more"),
        ({"output": "bad.jpg/x"}, r"--output"),
    ],
)
def test_bad_input_of_the_job(trained, tmp_path, look, says_why):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "folder").mkdir()
    look = {key: str(tmp_path / value) if key in ("data", "output") else value for key, value in look.items()}
    with pytest.raises(UserError, match=says_why) as raised:
        job(trained, f"{trained}/seen", **{"output": str(tmp_path / "out"), **look})
    assert "\n" not in str(raised.value)


def test_a_run_without_a_model(tmp_path):
    config = configs.replace(
        recipes.find("digits-cnn"), storage=str(tmp_path), name="bare", system_metrics=False
    )
    tracking.start_run(
        config, tracking.open_tracking_store(config.tracking, config.run.storage), continued=False
    )
    with pytest.raises(UserError, match="has no model"):
        job(tmp_path, "bare")
