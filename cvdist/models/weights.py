"""Pretrained weights: found by torchvision's name, path or URI, downloaded once per node, and verified.

Weights only work with the normalization that they were trained with, so both are looked up together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pickle
import re
import socket
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, get_model_weights

from cvdist import storage
from cvdist.config import BackboneConfig, Head, ModelConfig
from cvdist.errors import UserError
from cvdist.lock import locked
from cvdist.log import redact
from cvdist.models import heads
from cvdist.models.registry import find, skeleton, with_head

logger = logging.getLogger(__name__)

SOCKET_TIMEOUT = 10.0  # seconds without a byte from the server
WAIT_TIMEOUT = 1800.0  # seconds for another process of this node to finish its download


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are normalized: (pixel in [0, 1] - mean) / std, for each channel."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Origin:
    """Where pretrained weights came from, for records.

    Attributes:
        source: torchvision's name, path or URI.
        digest: hexadecimal SHA-256 of the file.
        preprocessing: the normalization that they were trained with.
        note: for people, what was left out of the file because the model has another head; or empty.
    """

    source: str
    digest: str
    preprocessing: Preprocessing
    note: str = ""


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights on the CPU, mapped from their file where its format allows it, and their origin."""

    origin: Origin
    state: Mapping[str, Tensor]


def _of_torchvision(name: str, weights: Any) -> Preprocessing:
    transforms = weights.transforms()
    return Preprocessing(name, tuple(transforms.mean), tuple(transforms.std))


# By the names that --weights-preprocessing takes.
PREPROCESSING = {
    preprocessing.name: preprocessing
    for preprocessing in (
        _of_torchvision("imagenet", VGG16_Weights.IMAGENET1K_V1),
        _of_torchvision("vgg-features", VGG16_Weights.IMAGENET1K_FEATURES),
    )
}


def preprocessing(settings: BackboneConfig) -> Preprocessing | None:
    """Return the normalization that the configured weights need, or None if there are no weights.

    No file is read, so a job can call this before it starts anything.

    Raises:
        UserError: if the normalization isn't known, contradicts torchvision's, or the model takes no weights.
    """
    find(settings.name).check_settings(with_head(settings))
    stated = PREPROCESSING[settings.weights_preprocessing] if settings.weights_preprocessing else None
    if not settings.has_weights:
        if stated:
            raise UserError("--weights-preprocessing is for the file that --weights names: name one")
        return None
    named = _torchvision_weights(settings)
    if named is None:
        if stated is None:
            raise UserError(
                f"--weights {redact(settings.weights)} is none of torchvision's for {settings.name} "
                f"({_names(settings)}), so a file: set --weights-preprocessing to the normalization that it "
                f"was trained with, {' or '.join(PREPROCESSING)}"
            )
        return stated
    expected = _of_torchvision("", named)
    known = next(p for p in PREPROCESSING.values() if (p.mean, p.std) == (expected.mean, expected.std))
    if stated not in (None, known):
        raise UserError(
            f"--weights {settings.weights} follows the normalization {known.name}: leave out "
            f"--weights-preprocessing {settings.weights_preprocessing}"
        )
    return known


def prepare(settings: ModelConfig) -> None:
    """Download the configured weights to this node if necessary, and check that they can be used.

    Raises:
        UserError: if they are missing, damaged, or belong to another architecture.
    """
    preprocessing(settings)
    if settings.has_weights:
        load(settings, skeleton(settings).state_dict())


def origin(model: nn.Module) -> Origin | None:
    """Return where the model's pretrained weights came from, or None if it was initialized at random."""
    return getattr(model, "origin", None)


def load(
    settings: ModelConfig, expected: Mapping[str, Tensor], *, last_layer: bool = False
) -> PretrainedWeights:
    """Load the configured weights for a model.

    Args:
        settings: names the weights.
        expected: state dict of the model; only names and shapes are used.
        last_layer: whether to include the last layer of the file's classifier, for as many classes as it has.

    Returns:
        The weights of all convolutions. If the file has a classifier with the model's head, also those of the
        classifier, without its last layer unless `last_layer` is given.

    Raises:
        UserError: if the weights are missing, damaged, or belong to another architecture.
    """
    normalization = preprocessing(settings)
    assert normalization is not None, "asked for weights without naming any"
    with _local_file(settings, normalization) as path:
        source = redact(settings.weights)
        content = _read(path, source)
        theirs, ours = heads.detect_head(content), settings.head_size
        other = theirs is not None and theirs != ours and _has_classifier(content)
        if other:
            content = _convolutions(content)
        state = _suitable(content, expected, source, settings.name)
        if last_layer and _has_classifier(content):
            state |= _last_layer(content, expected, source, settings.name)
        # Of the file, not of the tensors: `sha256sum` tells the same, and torchvision's file names begin it.
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    note = f"its convolutions only: {theirs} in the file, {ours} in the model" if other else ""
    return PretrainedWeights(Origin(source, digest, normalization, note), state)


def with_head_of_file(settings: ModelConfig) -> ModelConfig:
    """Return `settings` with the head of the configured weights, or unchanged if these have no known head.

    Raises:
        UserError: if the weights are missing or damaged.
    """
    normalization = preprocessing(settings)
    assert normalization is not None, "asked for weights without naming any"
    with _local_file(settings, normalization) as path:
        size = heads.detect_head(_read(path, redact(settings.weights)))
    if size is None:
        return settings
    return dataclasses.replace(settings, head=cast(Head, size.name), hidden_size=size.hidden_size)


# ------------------------------------------------------------------------------------------------- finding


@contextmanager
def _local_file(settings: ModelConfig, normalization: Preprocessing) -> Iterator[Path]:
    """Provide the path of a local copy of the weights' file.

    The path is valid inside of the context. A memory mapping of the file stays valid afterwards.
    """
    source, named = settings.weights, _torchvision_weights(settings)
    if named is not None:
        try:
            path = fetch(named.url)
        except DownloadError as error:
            raise UserError(
                f"--weights {source}: {error}. A file that you have serves as well: "
                f"--weights FILE --weights-preprocessing {normalization.name}"
            ) from error
        yield path
    elif "://" in source:
        yield _brought(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(
                f"--weights {source}: there is no such file; torchvision's names for {settings.name} are "
                f"{_names(settings)}"
            )
        yield path


def _torchvision_weights(settings: BackboneConfig) -> Any:
    """Return the member of torchvision's enum that `--weights` names, or None if it names a file."""
    return get_model_weights(settings.name).__members__.get(settings.weights)


def _names(settings: BackboneConfig) -> str:
    return ", ".join(weights.name for weights in get_model_weights(settings.name))


def _brought(uri: str) -> Path:
    """The file behind `uri` in the cache, under a name that changes when the file does."""
    found = storage.file_state(uri, "--weights")
    folder = _cache()
    identity = hashlib.sha256(f"{uri} {found.size} {found.modified}".encode()).hexdigest()
    path = folder / f"cvdist-{identity[:32]}.pth"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock"), f"copy {redact(uri)}", WAIT_TIMEOUT):
                if not path.is_file():
                    storage.download(uri, path, "--weights")
        except OSError as error:
            raise UserError(
                f"--weights {redact(uri)} can't be copied to {folder} ({_one_line(error)})"
            ) from error
    return path


def _cache() -> Path:
    """Return the folder in which `torch.hub` keeps downloads; the variable TORCH_HOME changes it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


# --------------------------------------------------------------------------------------------- downloading


class DownloadError(Exception):
    """Raised with one line that says what could not be downloaded, and why."""


def fetch(url: str) -> Path:
    """Download a file to the cache of `torch.hub`, unless it is there; once for all processes of a node.

    The content is checked against the first digits of its SHA-256 in the file's name, if the name has them, as
    torchvision's do.

    Returns:
        The path of the file.

    Raises:
        DownloadError: if the server does not answer, sends something else, or the cache can't be written.
    """
    folder = _cache()
    path = folder / Path(urlsplit(url).path).name
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), f"download {path.name}", WAIT_TIMEOUT):
            if not path.is_file():  # another process may have brought it while this one waited
                logger.info("downloading %s to %s", path.name, folder)
                _download(url, path)
    except Exception as error:  # whatever a proxy, a server or a disk can come up with
        raise DownloadError(f"{url} could not be downloaded to {folder} ({_one_line(error)})") from error
    return path


def _download(url: str, path: Path) -> None:
    """Download through a temporary file beside `path`, so that a file with this name is always complete."""
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)  # torch.hub sets none, and would wait for ever
    try:
        torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None, progress=False)
    finally:
        socket.setdefaulttimeout(before)


# ------------------------------------------------------------------------------------------------- reading


def _read(path: Path, source: str) -> dict[str, Tensor]:
    """Read the tensors of a file by name.

    Raises:
        UserError: if the file is damaged or is not a state dict.
    """
    # Mapped, so that workers of one node share its pages; torchvision's oldest files can't be.
    mapped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes raise all sorts of things
        if mapped and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"--weights {source} holds Python objects, which may run code when loaded: save the model "
                "with torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(f"--weights {source} {_what_is_wrong(path, mapped, error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        kind = f"a dictionary of {', '.join(map(str, content))}"[:100] if isinstance(content, dict) else ""
        raise UserError(
            f"--weights {source} holds {kind or 'a ' + type(content).__name__}, not a state dict (tensors by "
            "name): save the model with torch.save(model.state_dict(), FILE)"
        )
    return content


def _what_is_wrong(path: Path, is_zip: bool, error: Exception) -> str:
    """Return what a file is that `torch.load` does not take, and what to do about it, in one line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        return "is empty (0 bytes): copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return f"is a pointer of Git LFS ({size} bytes) in place of the file: bring the file with git lfs pull"
    if begin.startswith(b"<") or (head.isascii() and b"\0" not in head):
        kind = "an XML document" if begin.startswith(b"<?xml") else "an HTML page"
        kind = kind if begin.startswith(b"<") else "a text file"
        return (
            f"is {kind}, not weights: the download may have brought a message or a log-in page in their place"
        )
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name for name in names):
            return "is a TorchScript program: save the model with torch.save(model.state_dict(), FILE)"
        if not any(name.endswith("/data.pkl") for name in names):
            found = ", ".join(names[:3])
            return f"is a zip archive of other things ({found}), not a file of torch.save: unpack it"
    if head.startswith(b"PK") and not is_zip:
        return f"is cut short: its end is missing after {size:,} bytes. Copy or download it again"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed by gzip: unpack it"
    if head.startswith(b"\x89HDF") or head[8:10] == b'{"':
        kind = "an HDF5 file, as Keras writes them" if head.startswith(b"\x89") else "a safetensors file"
        return f"is {kind}: load it, and save the tensors by name with torch.save"
    return (
        f"is damaged, cut short or not a file of torch.save ({type(error).__name__}, {size:,} bytes): copy or "
        "download it again"
    )


def _suitable(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], source: str, model: str
) -> dict[str, Tensor]:
    """Select the entries of `state` that the model takes over.

    Raises:
        UserError: naming the first layer that differs, with both shapes.
    """
    last = heads.last_layer(expected)
    has_classifier = _has_classifier(state)
    state = {name: tensor for name, tensor in state.items() if not last or not name.startswith(last)}
    wanted = {name: tensor for name, tensor in expected.items() if not last or not name.startswith(last)}
    if not has_classifier:
        state, wanted = _convolutions(state), _convolutions(wanted)
    for name in [*wanted, *(name for name in state if name not in wanted)]:
        # Files older than PyTorch 0.4.1 have no such counters, and nothing here reads them.
        if name.endswith("num_batches_tracked"):
            continue
        theirs, ours = _shape(state.get(name)), _shape(wanted.get(name))
        if theirs != ours:
            raise UserError(
                f"--weights {source} is not of {model}: {name} is {theirs} in the file and {ours} in the model"
            )
        if not _finite(state[name]):
            raise UserError(f"--weights {source} is damaged: {name} has values that are not finite")
    return state


def _convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` without the tensors of its classifier."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}


def _last_layer(
    content: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, model: str
) -> dict[str, Tensor]:
    """Return weight (classes, inputs) and bias (classes,) of the file's last layer, by name.

    Raises:
        UserError: if the file has no last layer that fits the model.
    """
    last = heads.last_layer(expected)
    weight, bias = (content.get(f"{last}{name}") for name in ("weight", "bias"))
    inputs = expected[f"{last}weight"].shape[1]
    if weight is None or bias is None or weight.shape != (len(bias), inputs):
        raise UserError(
            f"--weights {source} is not of {model}: {last}weight is {_shape(weight)} in the file, and the "
            f"model's has {inputs} inputs"
        )
    return {f"{last}weight": weight, f"{last}bias": bias}


def names(model: str) -> list[str]:
    """Return the names of torchvision's weights for `model`; empty for a model that is not torchvision's."""
    return list(get_model_weights(model).__members__) if find(model).pretrained else []


def class_names(settings: ModelConfig) -> tuple[str, ...]:
    """Return the classes that torchvision's weights were trained on; empty for a file."""
    named = _torchvision_weights(settings)
    return tuple(named.meta["categories"]) if named is not None else ()


def _has_classifier(state: Mapping[str, Tensor]) -> bool:
    """Return whether there is a classifier with finite values.

    The classifier in torchvision's file IMAGENET1K_FEATURES consists of NaN.
    """
    return any(_finite(tensor) for name, tensor in state.items() if name.startswith("classifier."))


def _finite(tensor: Tensor) -> bool:
    # Of the sum: a NaN or an infinity stays one in it, and no second tensor of that size is needed.
    return bool(tensor.float().sum().isfinite())


def _shape(tensor: Tensor | None) -> str:
    return "x".join(map(str, tensor.shape)) if tensor is not None else "absent"


def _one_line(error: Exception) -> str:
    reason = getattr(error, "reason", error)  # the cause of urllib's errors
    return " ".join(str(reason).split())[:200] or type(error).__name__
