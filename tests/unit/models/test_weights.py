"""Files of pretrained weights: which are taken, and how they come."""

from __future__ import annotations

import gzip
import math
import zipfile
from argparse import Namespace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cvdist import models
from cvdist.config import ModelConfig
from cvdist.models import InputSpec, weights
from tests.helpers.jobs import user_error
from tests.helpers.networks import ALL, PHOTOS, without_memory

# --------------------------------------------------------------------------------------------- normalisation


def needs(model="scratch-cnn", **changes):
    return models.preprocessing(ModelConfig(name=model, **changes))


def test_each_set_of_weights_brings_its_normalization():
    of_features = needs("vgg16", weights="IMAGENET1K_FEATURES")
    assert of_features.mean == (0.48235, 0.45882, 0.40784) and of_features.std == (1 / 255,) * 3
    for name in ("mobilenet_v2", "vit_b_16", *ALL):
        of_all = needs(name, weights="IMAGENET1K_V1")
        assert (of_all.mean, of_all.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (of_all.size, of_all.resize) == (224, "crop:256:bilinear")
    better = needs("mobilenet_v2", weights="DEFAULT")
    assert better == needs("mobilenet_v2", weights="IMAGENET1K_V2") and better.resize == "crop:232:bilinear"
    swin = needs("swin_v2_t", weights="DEFAULT")
    assert (swin.size, swin.resize) == (256, "crop:260:bicubic")
    # Trained on pixels from -1 to 1: torchvision converts inside of the network, with its own weights.
    inception = needs("inception_v3", weights="DEFAULT")
    assert (inception.mean, inception.std, inception.size) == ((0.5,) * 3, (0.5,) * 3, 299)
    for file in ({"name": "vgg19"}, {"name": "vgg16", "weights_preprocessing": "imagenet"}):
        assert models.preprocessing(ModelConfig(weights="file.pth", **file)) == of_all
    assert needs("vgg16", weights="s3://bucket/file.pth", weights_preprocessing="vgg-features") == of_features
    assert needs("vgg16", trainable_stages=5) is None and needs() is None
    assert needs("vgg16", weights="IMAGENET1K_V1", weights_preprocessing="imagenet") == of_all


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"weights": "my.pth"},
            "--weights my.pth is none of torchvision's for vgg16 (IMAGENET1K_V1, IMAGENET1K_FEATURES, "
            "DEFAULT), so a file: set --weights-preprocessing to the normalization that it was trained with, "
            "imagenet or vgg-features",
        ),
        (
            {"weights": "IMAGENET1K_FEATURES", "weights_preprocessing": "imagenet"},
            "--weights IMAGENET1K_FEATURES follows the normalization vgg-features: leave out "
            "--weights-preprocessing imagenet",
        ),
        (
            {"weights_preprocessing": "imagenet", "trainable_stages": 5},
            "--weights-preprocessing is for the file that --weights names: name one",
        ),
    ],
)
def test_an_unknown_or_contradictory_normalization_is_refused(settings, text):
    assert user_error(needs, "vgg16", **settings) == text


# ------------------------------------------------------------------------------------------------- the files


def filled(name, value=0.5, features_only=False, num_classes=1000):
    """A state dict of small tensors that look large, each a single number over and over."""
    state = without_memory(name, num_classes=num_classes).state_dict()
    return {
        n: torch.tensor(value).expand(t.shape) for n, t in state.items() if not features_only or "features" in n
    }


def load(path, model="vgg11"):
    settings = ModelConfig(name=model, weights=str(path), weights_preprocessing="imagenet")
    return weights.load(settings, without_memory(model))


def refused(path, model="vgg11"):
    """The message, less the file's name."""
    message = user_error(load, path, model)
    assert message.startswith(f"--weights {path}")
    return message.removeprefix(f"--weights {path}")


def saved(folder, state, **options):
    torch.save(state, folder / "file.pth", **options)
    return folder / "file.pth"


def test_a_whole_model_gives_all_but_its_last_layer(tmp_path):
    path = saved(tmp_path, filled("vgg11"))
    settings = ModelConfig(name="vgg11", weights=str(path), weights_preprocessing="imagenet")
    model = models.build_model(settings, PHOTOS, 3)
    last = model.classifier[6]
    assert last.weight.shape == (3, 4096) and not last.weight.eq(0.5).any() and not last.bias.eq(0.5).any()
    assert last.weight.std().item() == pytest.approx((3 * 4096) ** -0.5, rel=0.1)
    rest = [p for name, p in model.named_parameters() if not name.startswith("classifier.6")]
    assert len(rest) == 20 and all(p.eq(0.5).all() for p in rest)


@pytest.mark.parametrize("suffix", ["", "_bn"])
def test_features_alone(tmp_path, suffix):
    name = f"vgg11{suffix}"
    state = load(saved(tmp_path, filled(name, features_only=True)), name).state
    assert state.keys() == {n for n in without_memory(name).state_dict() if n.startswith("features.")}


def test_a_classifier_of_nan_is_none(tmp_path):
    """As in the file that torchvision offers as IMAGENET1K_FEATURES."""
    state = filled("vgg11", math.nan) | filled("vgg11", features_only=True)
    assert all(name.startswith("features.") for name in load(saved(tmp_path, state)).state)


def test_files_without_batch_counters(tmp_path):
    """Those from before PyTorch 0.4.1, as torchvision's batch norm models partly are."""
    state = {n: t for n, t in filled("vgg11_bn").items() if "num_batches" not in n}
    assert "features.1.running_var" in load(saved(tmp_path, state), "vgg11_bn").state


def test_files_of_the_oldest_format(tmp_path):
    """Not a zip, so it can't be mapped. torchvision's VGG files are of that age."""
    path = saved(tmp_path, filled("vgg11", features_only=True), _use_new_zipfile_serialization=False)
    assert load(path).state["features.0.bias"].eq(0.5).all()


def test_absent_file():
    assert refused(Path("nowhere.pth"), "vgg16") == (
        ": there is no such file; torchvision's names for vgg16 are IMAGENET1K_V1, IMAGENET1K_FEATURES, DEFAULT"
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_file_cut_short(tmp_path, zipped, share):
    state = {name: tensor.clone() for name, tensor in list(filled("vgg11", features_only=True).items())[:6]}
    path = saved(tmp_path, state, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    says = "is damaged, cut short or not a file of torch.save ("
    if zipped:
        says = "is cut short: its end is missing after"
    assert refused(path).startswith(f" {says if share else 'is empty (0 bytes)'}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n<!DOCTYPE html>\n<html>Not found</html>", "is an HTML page, not weights"),
        (b"<?xml version='1.0'?><Error>", "is an XML document, not weights"),
        (b"404: Not Found", "is a text file, not weights"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 553433881\n",
            "is a pointer of Git LFS (73 bytes) in place of the file: bring the file with git lfs pull",
        ),
        (gzip.compress(b"weights", mtime=0), "is compressed by gzip: unpack it"),
        (b"\x0a" + bytes(7) + b'{"a": {}}', "is damaged, cut short or not a file of safetensors"),
    ],
)
def test_file_of_something_else(tmp_path, content, says):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert refused(path).startswith(f" {says}")


def test_zip_of_something_else(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/a.jpg", b"")
    assert refused(path).startswith(
        " is a zip archive of other things (photos/a.jpg), not a file of torch.save"
    )


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("whole", [nn.Linear(2, 2), Harmful()], ids=["a model", "a harmful object"])
def test_pickled_objects_are_not_loaded(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    assert refused(saved(tmp_path, whole)).startswith(
        " holds Python objects, which may run code when loaded: save"
    )
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"network": {"a": torch.ones(1)}, "epoch": 3}, "a dictionary of network, epoch"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, kind):
    assert refused(saved(tmp_path, content)).startswith(
        f" holds {kind}, not a state dict (tensors by name): save"
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [
        (
            "vgg11",
            "vgg16",
            "features.2.weight, features.2.bias and 22 more are missing in the file; the model has no "
            "features.3.weight, features.3.bias and 12 more",
        ),
        ("vgg16", "vgg16_bn", "features.1.weight, features.1.bias and "),
    ],
)
def test_another_vgg(tmp_path, theirs, ours, text):
    message = refused(saved(tmp_path, filled(theirs, features_only=True)), ours)
    assert message.startswith(f" is not of {ours}: {text}")


def test_another_shape(tmp_path):
    path = saved(tmp_path, filled("vgg11") | {"features.0.weight": torch.zeros(1).expand(64, 1, 3, 3)})
    assert (
        refused(path) == " is not of vgg11: features.0.weight is 64x1x3x3 in the file and 64x3x3x3 in the model"
    )


@pytest.mark.parametrize("entry", ["model_ema", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.backbone.", ""])
def test_checkpoints_of_other_tools_are_opened(tmp_path, entry, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in filled("vgg11", features_only=True).items()}
    found = load(
        saved(tmp_path, {entry: {**state, "n_averaged": torch.tensor(3)}, "epoch": 3, "args": Namespace(a=1)})
    )
    assert all(name.startswith("features.") for name in found.state) and len(found.state) == 16
    assert found.origin.note == f"its entry {entry} (beside epoch, args)"


def test_safetensors(tmp_path):
    state = {name: tensor.clone() for name, tensor in filled("vgg11", features_only=True).items()}
    save_file(state, tmp_path / "file.safetensors")
    assert load(tmp_path / "file.safetensors").state["features.0.bias"].eq(0.5).all()


def test_the_positions_of_a_transformer_fit_pictures_of_another_size(tmp_path):
    settings = ModelConfig(name="vit_b_32", head="linear", weights=str(tmp_path / "file.pth"))
    state = models.skeleton(settings).state_dict()
    saved(tmp_path, {name: torch.tensor(0.5).expand(tensor.shape) for name, tensor in state.items()})
    small = models.skeleton(settings, 1000, InputSpec(3, 64, 64))
    assert weights.load(settings, small).state["encoder.pos_embedding"].shape == (1, 5, 768)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["features.8.weight", "classifier.3.bias"])
def test_values_that_are_not_finite(tmp_path, name, bad):
    state = filled("vgg11")
    state[name] = state[name].clone()
    state[name].view(-1)[7] = bad
    assert refused(saved(tmp_path, state)) == f" is damaged: {name} has values that are not finite"


def test_by_uri(tmp_path):
    path = saved(tmp_path, filled("vgg11", features_only=True))
    origin = load(f"file://{path}").origin
    assert origin.source == f"file://{path}" and origin.digest == sha256(path.read_bytes()).hexdigest()
    assert refused(f"file://{tmp_path}/absent.pth").startswith(" can't be read (")
