"""Trained models as files for other programs, and these files run as other programs run them."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cvdist.config import ExportFormat
from cvdist.errors import UserError
from cvdist.models import library
from cvdist.models.cutting import WithoutValues
from cvdist.models.servable import ServableClassifier, servable
from cvdist.results import ModelIdentity
from cvdist.saved.model import SavedModel, rebuild

KEY = "cvdist"
"""Name of the description, a JSON text, in a file's metadata."""
PIXELS, PROBABILITIES = "pixels", "probabilities"  # input and output of the network in a file

_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
_LARGEST_ONNX = 2**31 - 2**20  # bytes of weights: a protobuf message has fewer than 2 GiB


def require_packages(format: ExportFormat) -> None:
    """Check that the packages for a format are installed.

    Raises:
        UserError: If one is missing.
    """
    missing = [name for name in _NEEDED.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format {format} needs {', '.join(missing)}: pip install cvdist[{format}]")


def describe(saved: SavedModel, format: ExportFormat) -> dict[str, Any]:
    """Describe a model for those who load its file: architecture, classes, input and preprocessing.

    `thresholds`, of a model with several labels a picture, are the least probabilities of its classes.
    `build` is the Python expression that makes the network; empty if only cvdist can.
    """
    identity, resize = saved.identity, saved.learned_resize()
    colors = "RGB" if identity.channels == 3 else "brightness"
    size = f"{identity.channels}, {identity.height}, {identity.width}"
    inside = ["pixels / 255", "(pixels - mean) / std for each channel"]
    outside = [f"upright by EXIF, {colors}, 0 to 255", _resizing(resize, identity)]
    given = f"{PIXELS}: uint8 (n, {size})"
    returned = f"{PROBABILITIES}: float32 (n, {len(identity.classes)}), in the order of the classes"
    if format == "safetensors":
        inside, outside = [], [*outside, *inside]
        given = f"float32 (n, {size})"
        after = "a sigmoid" if identity.multilabel else "a softmax"
        returned = f"float32 (n, {len(identity.classes)}), probabilities after {after}"
    return dataclasses.asdict(identity) | {
        **({"thresholds": saved.thresholds} if identity.multilabel else {}),
        "mean": saved.mean,
        "std": saved.std,
        "resize": resize,
        "build": _build(saved),
        "input": given,
        "output": returned,
        "before_the_network": outside,
        "in_the_network": inside,
        "digest": saved.digest,
    }


def dump(saved: SavedModel, format: ExportFormat, description: Mapping[str, Any]) -> bytes:
    """Make the content of a model's file.

    Raises:
        UserError: If the model can't be written in this format.
    """
    text = json.dumps(description)
    try:
        if format == "safetensors":
            return _safetensors(saved, text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (_onnx if format == "onnx" else _pt2)(saved, text)
    except UserError:
        raise
    except Exception as error:  # whatever a network does that a graph can't say
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{saved.source} can't be exported as {format} ({reason})") from error


def load(content: bytes, format: ExportFormat) -> Callable[[Tensor], Tensor]:
    """Open the content of a file as other programs do.

    Returns:
        Function from pixels, uint8 (n, C, H, W), to probabilities, float32 (n, classes).
    """
    return {"onnx": _load_onnx, "pt2": _load_pt2, "safetensors": _load_safetensors}[format](content)


# ------------------------------------------------------------------------------------------------- formats


def _program(saved: SavedModel) -> torch.export.ExportedProgram:
    identity = saved.identity
    example = torch.zeros(2, identity.channels, identity.height, identity.width, dtype=torch.uint8)
    network = servable(saved.model, saved.mean, saved.std, multilabel=identity.multilabel)
    return torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))


def _pt2(saved: SavedModel, text: str) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(saved), file, extra_files={KEY: text})
    return file.getvalue()


def _load_pt2(content: bytes) -> Callable[[Tensor], Tensor]:
    run: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(content)).module()
    return run


def _onnx(saved: SavedModel, text: str) -> bytes:
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved.model.state_dict().values())
    if size > _LARGEST_ONNX:
        raise UserError(
            f"{saved.source} has {size / 2**30:.1f} GiB of weights, and an ONNX file holds less than 2: "
            "--format pt2 or safetensors"
        )
    program = torch.onnx.export(
        _program(saved),
        dynamo=True,
        input_names=[PIXELS],
        output_names=[PROBABILITIES],
        verbose=False,
    )
    assert program is not None, "dynamo returns it"
    program.model.metadata_props[KEY] = text
    content: bytes = program.model_proto.SerializeToString()
    return content


def _load_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {PIXELS: pixels.numpy()})[0])


def _safetensors(saved: SavedModel, text: str) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in saved.model.state_dict().items()}
    content: bytes = save(tensors, {"format": "pt", KEY: text})
    return content


def _load_safetensors(content: bytes) -> Callable[[Tensor], Tensor]:
    """Open weights in the network that `build` makes, or in that of this package where there is none."""
    from safetensors.torch import load

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about, tensors = json.loads(header["__metadata__"][KEY]), load(content)
    fields = [field.name for field in dataclasses.fields(ModelIdentity)]
    identity = ModelIdentity.from_dict({name: about[name] for name in fields})
    if about["build"]:
        network = _library_network(identity)
        network.load_state_dict(tensors, assign=True)
    else:
        network = rebuild(identity, tensors, "the file")
    return ServableClassifier(network, about["mean"], about["std"], multilabel=identity.multilabel).eval()


# ----------------------------------------------------------------------------------------------- in words


def _library_network(identity: ModelIdentity) -> nn.Module:
    """Make the network of torchvision or timm, without values."""
    with WithoutValues(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.create(identity.name, len(identity.classes), identity.height)


def _build(saved: SavedModel) -> str:
    """Return the expression that makes the network without this package; empty if it is no one else's."""
    identity = saved.identity
    in_timm = identity.name.startswith(library.TIMM)
    if not in_timm and identity.name not in library.names():
        return ""
    theirs = {name: tensor.shape for name, tensor in _library_network(identity).state_dict().items()}
    if theirs != {name: tensor.shape for name, tensor in saved.model.state_dict().items()}:
        return ""  # another head
    options = library.options(identity.name, len(identity.classes), identity.height)
    words = "".join(f", {name}={value!r}" for name, value in options.items())
    if in_timm:
        return f"timm.create_model({identity.name.removeprefix(library.TIMM)!r}{words})"
    return f"torchvision.models.get_model({identity.name!r}{words})"


def _resizing(resize: str, identity: ModelIdentity) -> str:
    """Say how a picture is brought to the model's size, which no network does."""
    size = f"{identity.height}x{identity.width}"
    if resize == "squash":
        return f"the whole picture to {size}, without regard to its proportions, bilinear with antialiasing"
    if resize == "crop":
        return f"the middle square, 7/8 of the shorter side, to {size}, bilinear with antialiasing"
    _, shorter, interpolation = resize.split(":")
    return f"the shorter side to {shorter}, {interpolation} with antialiasing, then the middle {size}"
