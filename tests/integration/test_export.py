"""Exported models: each file is loaded without this package, by the lines that the job prints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys

import pytest
import torch
import torchvision

from cvdist.config import ExportConfig, ExportFileConfig, SavedModelConfig
from cvdist.data.images.ahead import Reader
from cvdist.errors import UserError
from cvdist.jobs.export import export, table
from cvdist.saved import exported, open_model
from tests.helpers.jobs import call, user_error
from tests.helpers.pictures import jpeg

CLASSES = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a small network that are random, but give different pictures different classes."""
    torch.manual_seed(1)
    network = torchvision.models.squeezenet1_1(num_classes=CLASSES).eval()
    with torch.no_grad():
        network.classifier[1].weight.mul_(300)
        network.classifier[1].bias[0] = -2
    path = tmp_path_factory.mktemp("weights") / "network.pth"
    torch.save(network.state_dict(), path)
    return path


def settings(source, model="squeezenet1_1", storage="", **asked):
    saved = SavedModelConfig(source=str(source), model=model, storage=str(storage))
    return ExportConfig(saved, ExportFileConfig(**{name: str(value) for name, value in asked.items()}))


@pytest.fixture
def photographs(tmp_path):
    for number in range(3):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(jpeg(number, 300, 260))
    return tmp_path / "pictures"


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_the_printed_lines_classify_a_picture_without_this_package(
    ending, weights, photographs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = f"out/model.{ending}"
    result = export(settings(weights, output=output, data=photographs))
    text = table(result)
    assert 0 < result.difference < 1e-5 and "3 of 3 get the same class" in text and "3 pictures in" in text
    (tmp_path / "photo.jpg").write_bytes(jpeg(7, 256, 300))
    lines = text.partition("without cvdist:")[2]
    assert "cvdist." not in lines and "from cvdist" not in lines and "import cvdist" not in lines
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(line.removeprefix("    ") for line in lines.splitlines()), {})
    name, probability = printed.getvalue().split()
    flags = ("--model", "squeezenet1_1", "--data", "photo.jpg", "--precision", "float32")
    done = call("predict", weights, *flags, storage=tmp_path)
    row = done.stdout.partition("photo.jpg ")[2].split()
    assert row[0] == name and float(row[1].rstrip("%")) == pytest.approx(100 * float(probability), abs=0.5)


@pytest.fixture
def several(weights, monkeypatch):
    """The same network as a model of several labels a picture, with thresholds, is what `export` opens."""
    saved = open_model(settings(weights).saved)
    identity = dataclasses.replace(saved.identity, multilabel=True)
    with torch.no_grad():
        saved.model.classifier[1].bias.sub_(1)
    saved = dataclasses.replace(saved, identity=identity, thresholds=(0.9, 0.2, 0.05))
    monkeypatch.setattr(sys.modules[export.__module__], "open_model", lambda _: saved)
    return saved


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_several_labels_are_sigmoids_and_the_printed_lines_compare_them_with_thresholds(
    ending, several, weights, photographs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = export(settings(weights, output=f"model.{ending}", data=photographs))
    text = table(result)
    assert 0 < result.difference < 1e-5 and "3 of 3 get the same labels" in text
    assert result.description["multilabel"] and result.description["thresholds"] == (0.9, 0.2, 0.05)
    (tmp_path / "photo.jpg").write_bytes(jpeg(7, 256, 300))
    lines = text.partition("without cvdist:")[2]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(line.removeprefix("    ") for line in lines.splitlines()), {})
    pixels = Reader(str(tmp_path), 224, several.learned_resize()).pixels(["photo.jpg"]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (several.mean, several.std))
    with torch.inference_mode():
        expected = several.model((pixels / 255 - mean) / std).sigmoid()[0].tolist()
    found = dict(line.split() for line in printed.getvalue().splitlines())
    names, least = several.identity.classes, several.thresholds
    wanted = {name: p for name, p, at in zip(names, expected, least, strict=True) if p >= at}
    assert 0 < len(wanted) < 3, expected  # or the thresholds show nothing
    assert {name: float(p) for name, p in found.items()} == pytest.approx(wanted, abs=0.02)


def test_another_label_of_a_file_is_an_error(several, weights, photographs, tmp_path, monkeypatch):
    load = exported.load

    def flipped(content, format):
        run = load(content, format)
        return lambda pixels: 1 - run(pixels)

    monkeypatch.setattr(exported, "load", flipped)
    with pytest.raises(UserError, match=r"[123] of 3 pictures get other labels, .* nothing was written"):
        export(settings(weights, output=tmp_path / "out.pt2", data=photographs))


def test_a_run_is_checked_with_its_pictures_and_a_network_of_cvdist_alone_is_said_to_be_one(trained, tmp_path):
    output = tmp_path / "digits.safetensors"
    config = settings("good", model="", storage=trained.storage, output=output)
    text = table(export(config))
    assert "the 1,000 validation pictures of the run:" in text and "16 of 16 get the same class" in text
    assert text.endswith("next: only cvdist has this network; with --format onnx or pt2 it is in the file")
    about = json.loads((tmp_path / "digits.safetensors.json").read_text())
    assert about["classes"] == [str(number) for number in range(10)] and about["build"] == ""
    assert about["digest"] == open_model(config.saved).digest


def test_a_file_that_predicts_otherwise_is_not_written(weights, tmp_path, monkeypatch):
    dump = exported.dump

    def another(saved, format, description):
        return dump(dataclasses.replace(saved, mean=(0.1, 0.9, 0.5)), format, description)

    monkeypatch.setattr(exported, "dump", another)
    with pytest.raises(UserError, match=r"does not predict what .* predicts: .* nothing was written"):
        export(settings(weights, output=tmp_path / "out.pt2"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "--output is needed"),
        (
            {"output": "model.bin"},
            "--output model.bin does not tell the format: name it with --format onnx, pt2",
        ),
        ({"output": "/proc/none/m", "format": "safetensors"}, "--output /proc/none/m can't be written"),
    ],
)
def test_what_can_not_be_written_is_one_line(asked, message, weights):
    assert user_error(export, settings(weights, **asked)).startswith(message)


def test_missing_packages_are_one_line(weights, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else name)
    with pytest.raises(UserError, match=r"--format onnx needs onnx, .*: pip install cvdist\[onnx\]"):
        export(settings(weights, output="m.onnx"))
