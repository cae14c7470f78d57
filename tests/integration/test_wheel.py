"""The package as people install it: a wheel, in a folder without a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.jobs import ROOT, the_error


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed wheel; its dependencies are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files beside the sources
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "cvdist", source / "cvdist", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", "-q", *offline, "-w", folder, source], check=True, timeout=120)
    (wheel,) = folder.glob("cvdist-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "-q", *offline, "--target", target, wheel], check=True, timeout=120)
    yield target
    shutil.rmtree(folder, ignore_errors=True)


def cvdist(installed, folder, *words):
    left_out = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "CVDIST_STORAGE")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(
        [installed / "bin" / "cvdist", *words],
        cwd=folder, env={**env, "PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip


def test_the_wheel_has_a_command_for_each_job(installed, tmp_path):
    overview = cvdist(installed, tmp_path, "--help")
    assert overview.returncode == 0, overview.stderr
    jobs = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    assert sorted(re.findall(r"^  (\w+)  ", overview.stdout, re.M)) == jobs
    assert "usage: cvdist sweep RECIPE" in cvdist(installed, tmp_path, "sweep").stdout
    flags = ("digits-cnn", "--epochs", "3", "--show-config")
    here = subprocess.run(
        [sys.executable, "jobs/train.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    shown = cvdist(installed, tmp_path, "train", *flags)
    assert shown.stdout == here.stdout and '"epochs": 3' in here.stdout
    assert the_error(cvdist(installed, tmp_path, "train", "digit-cnn")).startswith("unknown recipe 'digit-cnn'")
    assert not any(tmp_path.iterdir())


def test_the_wheel_has_the_templates_of_the_report(installed):
    templates = "cvdist/report_html/templates"
    there = {file.name: file.read_bytes() for file in (installed / templates).iterdir()}
    assert there == {file.name: file.read_bytes() for file in (ROOT / templates).iterdir()}


def test_it_trains_without_a_clone(installed, tmp_path):
    done = cvdist(
        installed, tmp_path, "train", "digits-cnn", "--runtime", "inline", "--epochs", "1",
        "--batch-size", "500", "--name", "first", "--no-visualize", "--no-system-metrics",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"best accuracy  \d+\.\d\d% \(\d+/1000\)", done.stdout), done.stdout
    assert (tmp_path / "runs" / "first").is_dir()
    again = cvdist(installed, tmp_path, "report", "first", "--output", "page.html")
    assert again.returncode == 0, again.stderr
    page = (tmp_path / "page.html").read_text()
    assert "cvdist train digits-cnn --runtime inline" in page and "python cvdist" not in page
