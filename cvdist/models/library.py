"""The classifiers of torchvision and timm: their networks, and their weights with preprocessing.

Names of timm's networks begin with `timm/`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cvdist.errors import UserError, did_you_mean
from cvdist.models.cutting import Cuts, WithoutValues, find_cuts

TIMM = "timm/"
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """The preparation of pictures for a network: (pixel in [0, 1] - mean) / std, for each channel.

    Attributes:
        name: Name of the normalization: `imagenet`, `vgg-features`, or empty.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        size: Height and width in pixels.
        resize: How photographs are brought to this size, as `PicturesConfig.resize`.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    resize: str


@dataclass(frozen=True)
class NamedWeights:
    """Pretrained weights that have a name.

    Attributes:
        url: Address of the weights.
        preprocessing: The preprocessing of pictures that the weights expect.
        classes: Names of the classes; empty if they are not known.
        file: Name of the downloaded file; empty: the name in the URL.
    """

    url: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    file: str = ""


@dataclass(frozen=True)
class _Build:
    """The parameters of a network's class, and the shapes of the network's tensors with all its outputs."""

    options: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]


def names() -> list[str]:
    """Return the names of all classifiers."""
    return list(_torchvision().list_models(module=_torchvision()))


def create(name: str, num_classes: int, side: int) -> nn.Module:
    """Build a network with random weights, on the default device.

    Args:
        name: Name of the network.
        num_classes: Number of outputs.
        side: Height and width of its pictures in pixels.
    """
    return _new(name, **options(name, num_classes, side))


def options(name: str, num_classes: int, side: int) -> dict[str, Any]:
    """Return the arguments that `create` builds a network with."""
    taken = _build(name).options
    chosen: dict[str, Any] = {"num_classes": num_classes}
    # Of networks whose weights depend on the size of the pictures.
    chosen |= {"image_size": side} if "image_size" in taken else {}
    chosen |= {"input_size": (side, side)} if "input_size" in taken else {}
    chosen |= {"img_size": side} if "img_size" in taken else {}
    # A second classifier, which only training from scratch has a use for.
    return chosen | ({"aux_logits": False, "init_weights": True} if "aux_logits" in taken else {})


def file_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a file of a whole network has, by name."""
    return _build(name).shapes


def _new(name: str, **options: Any) -> nn.Module:
    network: nn.Module
    if name.startswith(TIMM):
        network = _timm().create_model(name.removeprefix(TIMM), pretrained=False, **options)
    else:
        network = _torchvision().get_model_builder(name)(weights=None, **options)
    return network


def require(name: str) -> None:
    """Check that a network of timm exists.

    Raises:
        UserError: if timm is not installed, or has no such network.
    """
    known, word = _timm().list_models(), name.removeprefix(TIMM)
    if word.split(".")[0] not in known:
        hint = did_you_mean(word, known, "timm.list_models() names all")
        raise UserError(f"--model {name}: timm has no such model: {hint}")


def _torchvision() -> Any:
    from torchvision import models  # takes long to import, and networks of this project do without it

    return models


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("--model timm/... needs timm: pip install cvdist[timm]") from error
    return timm


@functools.cache
def _build(name: str) -> _Build:
    with WithoutValues(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a default that will change
        network = _new(name)
    options = frozenset(inspect.signature(type(network).__init__).parameters)
    return _Build(options, {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})


@functools.cache
def cuts(name: str) -> Cuts:
    """Return where a network can be cut, for pictures of the size that it was designed for.

    Raises:
        UserError: if it can't be cut.
    """
    side = default_side(name)
    try:
        with WithoutValues():
            network = create(name, 1000, side)
        with torch.device("meta"):
            return find_cuts(network.to("meta"), torch.zeros(1, 3, side, side))
    except Exception as error:  # whatever a network does that a graph can't say
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--model {name} can't be divided into frozen and trained layers ({reason}): choose another one"
        ) from error


@functools.cache
def named_weights(name: str) -> dict[str, NamedWeights]:
    """Return the weights of a network by their names, with `DEFAULT` for the best ones."""
    if name.startswith(TIMM):
        return {"DEFAULT": _weights_of_timm(name)}
    found = {}
    for key, weights in _torchvision().get_model_weights(name).__members__.items():
        given = weights.transforms()
        mean, std = tuple(given.mean), tuple(given.std)
        resize = f"crop:{given.resize_size[0]}:{given.interpolation.value}"
        preprocessing = Preprocessing(_normalization(mean, std), mean, std, given.crop_size[0], resize)
        if "transform_input" in _build(name).options and preprocessing.name == "imagenet":
            # These networks were trained on pixels from -1 to 1. With its own weights torchvision converts
            # inside of the network; without, as here, the pictures have to come like this.
            preprocessing = Preprocessing("", (0.5,) * 3, (0.5,) * 3, preprocessing.size, resize)
        found[key] = NamedWeights(weights.url, preprocessing, tuple(weights.meta["categories"] or ()))
    return found


def _weights_of_timm(name: str) -> NamedWeights:
    """Return the weights that timm itself would take, with the preprocessing in its `pretrained_cfg`."""
    given = _timm().get_pretrained_cfg(name.removeprefix(TIMM))
    mean, std, size = tuple(given.mean), tuple(given.std), given.input_size[-1]
    resize = (
        "squash" if given.crop_mode == "squash" else f"crop:{int(size / given.crop_pct)}:{given.interpolation}"
    )
    hub = f"https://huggingface.co/{given.hf_hub_id}{given.architecture}.{given.tag}/resolve/main/model.safetensors"
    return NamedWeights(
        given.url or hub,
        Preprocessing(_normalization(mean, std), mean, std, size, resize),
        (),
        name.replace("/", "-"),
    )


def default_side(name: str) -> int:
    """Return the height and width in pixels of the pictures that a network was designed for."""
    return next(iter(named_weights(name).values())).preprocessing.size


@functools.cache
def problem(name: str, height: int, width: int) -> str:
    """Return why a network can't take pictures of this size, in pixels; empty if it can."""
    try:
        with WithoutValues():
            network = create(name, 2, height).to("meta").eval()
            network(torch.zeros(1, 3, height, width, device="meta"))
    except Exception as error:  # whatever a network checks, and convolutions that have no output
        if not name.startswith(TIMM):
            least = min(next(iter(_torchvision().get_model_weights(name))).meta["min_size"])
            if min(height, width) < least:
                return f"takes pictures of {least}x{least} pixels or more, these are {height}x{width}"
        side = default_side(name)
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        return f"does not take pictures of {height}x{width} pixels ({reason}), it was made for {side}x{side}"
    return ""


def _normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    return "imagenet" if (mean, std) == _IMAGENET else "vgg-features" if std == (1 / 255,) * 3 else ""
