"""Pretrained weights: found by torchvision's name, path or URI, downloaded once per node, and verified.

Weights only work with the normalization that they were trained with, so both are looked up together.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import logging
import pickle
import re
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cvdist import storage
from cvdist.config import BackboneConfig, Head, ModelConfig, PreprocessConfig, TrainConfig, replace
from cvdist.errors import UserError
from cvdist.lock import locked
from cvdist.log import redact
from cvdist.models import state_dicts
from cvdist.models.library import Preprocessing, cuts, file_shapes, named_weights
from cvdist.models.registry import find, skeleton, with_head

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", TrainConfig, PreprocessConfig)

SOCKET_TIMEOUT = 10.0  # seconds without a byte from the server
WAIT_TIMEOUT = 1800.0  # seconds for another process of this node to finish its download


@dataclass(frozen=True)
class Origin:
    """The origin of pretrained weights, for records.

    Attributes:
        source: torchvision's name, path or URI.
        digest: hexadecimal SHA-256 of the file.
        preprocessing: how pictures are prepared for them.
        note: text for people on what was taken out of the file and what was left out, or empty.
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


@functools.cache
def normalizations() -> dict[str, Preprocessing]:
    """Return what pretrained weights expect of pixels, by the names that `--weights-preprocessing` takes."""
    return {weights.preprocessing.name: weights.preprocessing for weights in named_weights("vgg16").values()}


def preprocessing(settings: BackboneConfig) -> Preprocessing | None:
    """Return the preprocessing that the configured weights need, or None if there are no weights.

    For a file it is that of the model's first weights, with the normalization of `--weights-preprocessing` if
    that is given. No file is read, so a job can call this before it starts anything.

    Raises:
        UserError: if the normalization isn't known, contradicts the weights', or the model takes no weights.
    """
    find(settings.name).check_settings(with_head(settings))
    if not settings.has_weights:
        if settings.weights_preprocessing:
            raise UserError("--weights-preprocessing is for the file that --weights names: name one")
        return None
    named = named_weights(settings.name)
    if settings.weights in named:
        known = named[settings.weights].preprocessing
        if settings.weights_preprocessing not in ("", known.name):
            raise UserError(
                f"--weights {settings.weights} follows the normalization {known.name or known.mean}: leave out "
                f"--weights-preprocessing {settings.weights_preprocessing}"
            )
        return known
    usual = next(iter(named.values())).preprocessing
    if settings.weights_preprocessing:
        stated = normalizations()[settings.weights_preprocessing]
        return dataclasses.replace(usual, name=stated.name, mean=stated.mean, std=stated.std)
    if needs_normalization(settings):
        raise UserError(
            f"--weights {redact(settings.weights)} is none of torchvision's for {settings.name} "
            f"({', '.join(named)}), so a file: set --weights-preprocessing to the normalization that it "
            f"was trained with, {' or '.join(normalizations())}"
        )
    return usual


def needs_normalization(settings: BackboneConfig) -> bool:
    """Return whether `--weights-preprocessing` has to say what the file in `--weights` was trained with."""
    if find(settings.name).stages is None or not settings.has_weights:
        return False
    named = named_weights(settings.name)
    kinds = {(one.preprocessing.mean, one.preprocessing.std) for one in named.values()}
    return settings.weights not in named and len(kinds) > 1


def with_preprocessing(config: Settings) -> Settings:
    """Return a job's settings with the size and the resizing that the weights expect, if it leaves them open.

    Args:
        config: has the groups `data` and `model`.

    Raises:
        UserError: as `preprocessing`.
    """
    data, model = config.data, config.model
    if data.image_size and data.resize != "weights":
        return config
    needs = preprocessing(model)
    usual = needs.size if needs is not None else find(model.name).default_input.height
    size = data.image_size or usual
    resize = data.resize
    if resize == "weights":
        resize = "squash" if needs is None else needs.resize
        if size != usual and needs is not None:  # the same part of the picture
            kind, side, how = resize.split(":")
            resize = f"{kind}:{round(int(side) * size / usual)}:{how}"
    return replace(config, image_size=size, resize=resize)


def prepare(settings: BackboneConfig) -> None:
    """Download the configured weights to this node if necessary, and check that they can be used.

    Raises:
        UserError: if they are missing, damaged, or belong to another architecture.
    """
    preprocessing(settings)
    if settings.has_weights:
        load(settings, skeleton(with_head(settings)))


def prepare_with_cut(settings: BackboneConfig) -> BackboneConfig:
    """Do what `prepare` does, and return `settings` with the features that the weights suffice for.

    These are `pooled` or, of a network of convolutions whose other layers the file does not have, `maps`.

    Raises:
        UserError: as `prepare`.
    """
    pooled, maps = (dataclasses.replace(settings, features_at=at) for at in ("pooled", "maps"))
    try:
        prepare(pooled)
        return pooled
    except UserError as error:
        if not isinstance(error.__cause__, DownloadError):
            with contextlib.suppress(UserError):
                prepare(maps)
                return maps
        raise


def origin(model: nn.Module) -> Origin | None:
    """Return where the model's pretrained weights came from, or None if it was initialized at random."""
    return getattr(model, "origin", None)


def load(settings: BackboneConfig, model: nn.Module, *, last_layer: bool = False) -> PretrainedWeights:
    """Load the configured weights for a model.

    Args:
        settings: names the weights.
        model: a `TransferModel`; only the names and shapes of its tensors are used.
        last_layer: whether to include the last layer of the file's classifier, for as many classes as it has.

    Returns:
        The weights of all layers in front of the head. If the file has the model's head, also those of the
        head, without its last layer unless `last_layer` is given.

    Raises:
        UserError: if the weights are missing, damaged, or belong to another architecture.
    """
    needs = preprocessing(settings)
    assert needs is not None, "asked for weights without naming any"
    with _local_file(settings) as path:
        source = redact(settings.weights)
        opened = state_dicts.open_state(
            _read(path, source), source, file_shapes(settings.name), model.state_dict()
        )
        fitted = state_dicts.fit(
            opened.state, settings.name, source, file_shapes(settings.name), model, last_layer
        )
        # Of the file, not of the tensors: `sha256sum` prints it, and torchvision file names have its start.
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    note = "; ".join(one for one in (opened.note, fitted.note) if one)
    return PretrainedWeights(Origin(source, digest, needs, note), fitted.state)


def with_head_of_file(settings: ModelConfig) -> ModelConfig:
    """Return `settings` with the head of the configured weights: one of ours on maps, or the network's own.

    Raises:
        UserError: if the weights are missing or damaged.
    """
    with _local_file(settings) as path:
        source, shapes = redact(settings.weights), file_shapes(settings.name)
        content = state_dicts.open_state(_read(path, source), source, shapes, {}).state
    own = dataclasses.replace(settings, head="linear", features_at="pooled")
    names: tuple[Head, ...] = ("vgg", "mlp", "linear") if cuts(settings.name).maps else ()
    hidden = len(content["classifier.0.weight"]) if "classifier.0.weight" in content else 0
    on_maps = [
        dataclasses.replace(settings, head=head, features_at="maps", hidden_size=hidden * (head != "linear"))
        for head in names
    ]
    # VGG's own classifier is the head `vgg`. The other networks' own ones come before heads of ours.
    for one in (*on_maps[:1], own, *on_maps[1:]):
        if state_dicts.has_head(content, skeleton(one)):
            return one
    # No head at all: one that the file's layers are enough for.
    return next((one for one in (own, *on_maps[:1]) if state_dicts.has_backbone(content, skeleton(one))), own)


# ------------------------------------------------------------------------------------------------- finding


@contextlib.contextmanager
def _local_file(settings: BackboneConfig) -> Iterator[Path]:
    """Provide the path of a local copy of the weights' file.

    The path is valid inside of the context. A memory mapping of the file stays valid afterwards.
    """
    source, named = settings.weights, named_weights(settings.name).get(settings.weights)
    if named is not None:
        try:
            path = fetch(named.url, named.file)
        except DownloadError as error:
            raise UserError(
                f"--weights {source}: {error}. A file that you have serves as well: --weights FILE"
            ) from error
        yield path
    elif "://" in source:
        yield _brought(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(
                f"--weights {source}: there is no such file; torchvision's names for {settings.name} are "
                f"{', '.join(named_weights(settings.name))}"
            )
        yield path


def _brought(uri: str) -> Path:
    """Copy the file at `uri` to the cache if necessary, and return its path, which changes with the file."""
    found = storage.file_state(uri, "--weights")
    folder = _cache()
    identity = hashlib.sha256(f"{uri} {found.size} {found.mtime_ns or 0}".encode()).hexdigest()
    path = folder / f"cvdist-{identity[:32]}.pth"
    try:
        _once(path, f"copy {redact(uri)}", lambda: storage.download(uri, path, "--weights"))
    except OSError as error:
        raise UserError(f"--weights {redact(uri)} can't be copied to {folder} ({_one_line(error)})") from error
    return path


def _once(path: Path, what: str, bring: Callable[[], None]) -> None:
    """Call `bring` to get a file into the cache, unless it is there; once for all processes of a node."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), what, WAIT_TIMEOUT):
            if not path.is_file():  # another process may have brought it while this one waited
                bring()


def _cache() -> Path:
    """Return the folder in which `torch.hub` keeps downloads; the variable TORCH_HOME changes it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


# --------------------------------------------------------------------------------------------- downloading


class DownloadError(Exception):
    """Raised with one line that says what could not be downloaded, and why."""


def fetch(url: str, file: str = "") -> Path:
    """Download a file to the cache of `torch.hub`, unless it is there; once for all processes of a node.

    The content is checked against the first digits of its SHA-256 in the file's name, if the name has them, as
    torchvision's do.

    Args:
        url: where the file is.
        file: its name in the cache; empty: that in the URL.

    Returns:
        The path of the file.

    Raises:
        DownloadError: if the server does not answer, sends something else, or the cache can't be written.
    """
    folder = _cache()
    path = folder / (file or Path(urlsplit(url).path).name)
    try:
        _once(path, f"download {path.name}", lambda: _download(url, path))
    except Exception as error:  # whatever a proxy, a server or a disk can come up with
        raise DownloadError(f"{url} could not be downloaded to {folder} ({_one_line(error)})") from error
    return path


def _download(url: str, path: Path) -> None:
    """Download through a temporary file beside `path`, so that a file with this name is always complete."""
    logger.info("downloading %s to %s", path.name, path.parent)
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)  # torch.hub sets none, and would wait for ever
    try:
        torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None, progress=False)
    finally:
        socket.setdefaulttimeout(before)


# ------------------------------------------------------------------------------------------------- reading


def _read(path: Path, source: str) -> Any:
    """Read what a file holds: a state dict, or one among other things.

    Raises:
        UserError: if the file is damaged.
    """
    # Mapped, so that workers of one node share its pages; torchvision's oldest files can't be.
    mapped = zipfile.is_zipfile(path)
    try:
        if state_dicts.is_safetensors(path):
            return load_file(path)
        # What training scripts keep beside the weights, such as torchvision's and timm's.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes raise all sorts of things
        if mapped and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"--weights {source} holds Python objects, which may run code when loaded: save the model "
                "with torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(f"--weights {source} {_what_is_wrong(path, mapped, error)}") from error
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
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file, as Keras writes them: load it, and save the tensors by name with torch.save"
    kind = "safetensors" if state_dicts.is_safetensors(path) else "torch.save"
    return (
        f"is damaged, cut short or not a file of {kind} ({type(error).__name__}, {size:,} bytes): copy or "
        "download it again"
    )


def names(model: str) -> list[str]:
    """Return the names of torchvision's weights for `model`; empty for a model that is not torchvision's."""
    return list(named_weights(model)) if find(model).stages is not None else []


def class_names(settings: ModelConfig) -> tuple[str, ...]:
    """Return the classes of the configured weights; for a file, those of the model's first weights."""
    named = named_weights(settings.name)
    return named.get(settings.weights, next(iter(named.values()))).classes


def _one_line(error: Exception) -> str:
    reason = getattr(error, "reason", error)  # the cause of urllib's errors
    return " ".join(str(reason).split())[:200] or type(error).__name__
