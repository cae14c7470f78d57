"""Jobs as commands: help, mistakes, and what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from cvdist import storage
from cvdist.jobs import cli
from cvdist.runtime import ray_cluster
from tests.helpers import pictures
from tests.helpers.feature_caches import write_weights
from tests.helpers.jobs import ROOT, call, the_error


def test_the_job_says_it_in_one_line_before_anything_starts(tmp_path):
    root = pictures.write(tmp_path / "one", {"cat": 3})
    words = ("dogs-cats-cnn", "--runtime", "inline", "--data", root)
    done = call("train", *words, storage=tmp_path, CVDIST_CACHE=str(tmp_path / "cache"))
    assert the_error(done) == f"--data {root} has one class, cat (3 pictures): a classifier needs two or more"
    assert "workers" not in done.stderr
    done = call("train", "dogs-cats-cnn", storage=tmp_path)
    assert the_error(done).startswith("--data is needed: the folder or URI of the pictures")


def test_what_is_written_past_python_is_among_the_messages_of_libraries(tmp_path):
    """Ray's core writes to the process's standard error itself."""
    script = """
import os, sys, types
from cvdist import log
from cvdist.jobs import quiet
with quiet.console("train", verbose=sys.argv[1] == "verbose"):
    log.setup()
    quiet.expect_ray()
    sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: None)  # connected
    os.write(2, b"core_worker.cc: one\\n")
    sys.stderr.write("for people\\n")
    quiet.disconnect()
    os.write(2, b"after it\\n")
"""
    for how in ("quiet", "verbose"):
        done = subprocess.run(
            [sys.executable, "-c", script, how],
            env={**os.environ, "CVDIST_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        shown = done.stderr.splitlines()
        assert shown[-2:] == ["for people", "after it"]
        assert ("core_worker.cc: one" in shown) == (how == "verbose")
        if how == "quiet":
            (file,) = (tmp_path / "logs").iterdir()
            assert file.read_text() == "core_worker.cc: one\n" and str(file) in shown[0]


def test_every_job_reads_a_folder_the_same_way(tmp_path):
    """Folders as people download them: the jobs say what they made of them, and refuse the same ones."""
    train = ("train", "dogs-cats-cnn", "--epochs", "1", "--tracking", "none")
    extract = (
        "preprocess",
        "dogs-cats-vgg16-features",
        "--model",
        "vgg11",
        "--weights-preprocessing",
        "imagenet",
    )
    extract += (
        "--weights",
        write_weights(tmp_path / "vgg11.pth"),
        "--features",
        tmp_path / "features",
        "--replace",
    )
    parts = ("training_set", "test_set")
    kaggle = pictures.write(tmp_path / "kaggle", {f"{part}/{name}": 4 for part in parts for name in "ab"})
    rare = pictures.write(tmp_path / "rare", {"10": 9, "2": 9, "9": 1})
    folds = pictures.write(tmp_path / "folds", {f"fold{i}/{name}": 2 for i in (1, 2) for name in "ab"})

    def done(words, root, *more):
        quick = ("--runtime", "inline", "--image-size", "32", "--data", root)
        return call(*words, *quick, *more, storage=tmp_path / "runs", CVDIST_CACHE=str(tmp_path / "cache"))

    for words, flag in ((train, "--storage"), (extract, "--features")):
        for root, line in ((kaggle, "validated on test_set"), (rare, "which is in training only: 9")):
            job = done(words, root)
            assert line in job.stderr and job.returncode == 0, job.stderr
        assert "each with a, b in it: if they are splits" in the_error(done(words, folds))
        error = the_error(done(words, rare, flag, rare / "10"))
        assert error.startswith(f"{flag} {rare}/10 is among the pictures of --data {rare}")
    assert sorted(path.name for path in rare.iterdir()) == ["10", "2", "9"]


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_what_the_driver_can_see_is_said_before_ray_starts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ray_cluster, "connect", Mock(side_effect=AssertionError))
    root = pictures.write(tmp_path / "four", pictures.FOUR)
    (tmp_path / "page.pth").write_text("<html>Sign in</html>")
    words = ["dogs-cats-vgg16", "--weights-preprocessing", "imagenet", "--tracking", "none"]

    def error(*more):
        return the_error(
            call(name, *words, *more, storage=tmp_path / "runs", CVDIST_CACHE=str(tmp_path / "cache"))
        )

    page = ["--weights", tmp_path / "page.pth"]
    assert "is an HTML page, not weights" in error("--data", root, *page)
    assert "can't be read (there is no such file" in error("--data", tmp_path / "no", *page)
    words = ["digits-cnn"]
    assert "no MLflow server answers" in error("--tracking-uri", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "free_bytes", lambda uri: 100_000)
    assert "has room for 0 MB, and one checkpoint takes about 0 MB" in error("--tracking", "none")


def test_an_error_is_one_line_and_debug_shows_where(tmp_path):
    words = ("train", "mnist-cnn", "--epoch", "7")
    plain = call(*words, storage=tmp_path)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("error: unknown flag --epoch") and plain.stderr.count("\n") == 1
    assert "Traceback" in call(*words, "--debug", storage=tmp_path).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_does_not_make_a_finished_job_a_failed_one():
    script = "import sys; from cvdist.jobs import cli; sys.exit(cli.main(lambda _: cli.show('done'), []))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=full, cwd=ROOT, check=False)
    assert done.returncode == 0


def python(script):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_jobs_name_means_its_function_whatever_was_imported_first():
    ways = [
        "from cvdist.jobs import replay",
        "import cvdist.jobs.replay\nfrom cvdist.jobs import replay",
        "from cvdist.jobs.replay import ReplayResult\nfrom cvdist.jobs import replay",
        "replay = cvdist.jobs.replay\nimport cvdist.jobs.replay\nassert cvdist.jobs.replay is replay",
        "from cvdist.jobs import ReplayResult, replay\nimport cvdist.jobs.cli",
    ]
    done = python(
        f"""
import inspect, sys
for imports in {ways!r}:
    for name in [name for name in sys.modules if name.split(".")[0] == "cvdist"]:
        del sys.modules[name]
    import cvdist.jobs
    assert not {{"torch", "ray", "mlflow"}} & set(sys.modules)
    names = {{"cvdist": cvdist}}
    exec(imports, names)
    assert inspect.isfunction(names["replay"]), imports
    assert sys.modules["cvdist.jobs.replay"].ReplayResult is cvdist.jobs.ReplayResult
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_command_line_is_read_without_torch_ray_and_mlflow():
    subjects = {"RECIPE": ["digits-cnn"], "": ["--data", "a"]}
    words = {name: subjects.get(job.subject, ["a"]) for name, job in cli.JOBS.items()}
    calls = [f"cli.parse({name!r}, {mine!r})" for name, mine in words.items()]
    done = python(
        f"import sys\nfrom cvdist.jobs import cli\n{chr(10).join(calls)}\n"
        "assert not {'torch', 'ray', 'mlflow', 'matplotlib'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
