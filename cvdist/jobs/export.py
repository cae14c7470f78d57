"""Export a trained model to a file for other programs, and compare the two before the file is written."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast, get_args

import torch
from torch import Tensor

from cvdist import config as configs
from cvdist import log, storage
from cvdist.config import ExportConfig, ExportFileConfig, ExportFormat
from cvdist.data.normalize import Normalizer
from cvdist.errors import UserError
from cvdist.jobs import console
from cvdist.jobs.visualize import find_pictures
from cvdist.log import redact
from cvdist.models.servable import probabilities
from cvdist.multilabel import at_or_above
from cvdist.runtime.signals import sigterm_raises
from cvdist.saved import SavedModel, exported, open_model
from cvdist.seeding import generator

logger = logging.getLogger(__name__)

_PICTURES = 16  # number of pictures that the file is checked with
_ALLOWED = 1e-4  # difference of a probability; float32 in another order of operations stays below a tenth
_WHERE_RESIZED = {
    "onnx": "normalization is inside; resizing is described in the metadata",
    "pt2": "normalization is inside; resizing is described in the metadata",
    "safetensors": "resizing and normalization are described in the JSON and in the metadata",
}


@dataclass(frozen=True)
class ExportResult:
    """A model that was written.

    Args:
        model: the model in words.
        format: the format of the file.
        files: size in bytes of each written file, by its path or URI; first the model.
        description: what the file says about itself (`cvdist.saved.exported.describe`).
        pictures: the pictures that model and file have predicted, in words.
        predicted: number of these pictures; model and file gave each of them the same class or labels.
        difference: the largest difference between a probability of the model and of the file.
        seconds: from start to end.
    """

    model: str
    format: ExportFormat
    files: dict[str, int]
    description: dict[str, Any]
    pictures: str
    predicted: int
    difference: float
    seconds: float


def export(config: ExportConfig) -> ExportResult:
    """Write the model, if the file predicts what the model predicts.

    Raises:
        UserError: for all that the user can correct, and if the file predicts otherwise. Nothing is written
            then.
        SystemExit: on SIGTERM.
    """
    began = time.monotonic()
    configs.check_groups(config)
    asked = config.export
    format = _format(asked)
    configs.require_outside(asked.root or asked.data, output=asked.output)
    exported.require_packages(format)
    with sigterm_raises():
        saved = open_model(config.saved)
        saved.require_classifier()
        pixels, pictures = _pictures(saved, config)
        logger.info("model      %s, %s", saved.source, saved.identity)
        logger.info("pictures   %s", pictures)
        description = exported.describe(saved, format)
        content = exported.dump(saved, format, description)
        difference = _compare(saved, exported.load(content, format), pixels)
        files = {asked.output: content}
        if format == "safetensors":
            files[_beside(asked.output)] = json.dumps(description, indent=1).encode()
        storage.write_files(files, "--output")
    return ExportResult(
        model=f"{saved.source}, {saved.identity}",
        format=format,
        files={name: len(content) for name, content in files.items()},
        description=description,
        pictures=pictures,
        predicted=len(pixels),
        difference=difference,
        seconds=time.monotonic() - began,
    )


def _format(asked: ExportFileConfig) -> ExportFormat:
    if not asked.output:
        raise UserError("--output is needed: the file that the model is written to, such as model.onnx")
    ending, known = PurePosixPath(asked.output).suffix.removeprefix("."), get_args(ExportFormat)
    if not asked.format and ending not in known:
        raise UserError(
            f"--output {redact(asked.output)} does not tell the format: name it with --format "
            f"{', '.join(known)}"
        )
    return cast(ExportFormat, asked.format or ending)


def _pictures(saved: SavedModel, config: ExportConfig) -> tuple[Tensor, str]:
    """Return pixels, uint8 (n, C, H, W), of a few pictures, and say which pictures they are."""
    asked = config.export
    found = find_pictures(saved, asked, asked.data, _PICTURES, config.saved.storage)
    if found is not None:
        pixels, _ = found.source.read(range(min(_PICTURES, found.source.size)))
        return pixels, found.words
    shape = (_PICTURES, saved.identity.channels, saved.identity.height, saved.identity.width)
    made = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator("pictures of an export"))
    return made, f"{_PICTURES} made-up ones, of random pixels (--data names real ones)"


@torch.inference_mode()
def _compare(saved: SavedModel, run: Callable[[Tensor], Tensor], pixels: Tensor) -> float:
    """Return the largest difference between the probabilities of the model and those of its file, if small."""
    normalize = Normalizer(saved.mean, saved.std, torch.device("cpu"), channels_last=True)
    several = saved.identity.multilabel
    expected = probabilities(saved.model(normalize(pixels.float())), multilabel=several)
    # In batches of two sizes, since the file has to take batches of any size.
    found = torch.cat([run(batch) for batch in (pixels[:1], pixels[1:]) if len(batch)])
    difference = float((found - expected).abs().max())
    if several:
        answers, other = [at_or_above(one, saved.thresholds) for one in (found, expected)], "other labels"
    else:
        answers, other = [one.argmax(1, keepdim=True) for one in (found, expected)], "another class"
    others = int((answers[0] != answers[1]).any(1).sum())
    if others or not difference <= _ALLOWED:  # also where it is NaN
        raise UserError(
            f"the file does not predict what {saved.source} predicts: {others} of {len(pixels)} pictures get "
            f"{other}, probabilities differ by up to {difference:.2g}; nothing was written"
        )
    return difference


def _beside(output: str) -> str:
    """Return the file of the description, beside the file of the weights."""
    options = storage.split(output)[2]
    return f"{output.removesuffix(options)}.json{options}"


# ------------------------------------------------------------------------------------------------- printing


def table(result: ExportResult) -> str:
    """Format what was written and how close it is to the model, and the lines that load it."""
    same = "labels" if result.description["multilabel"] else "class"
    rows = [("model", result.model)]
    rows += [("written", f"{redact(name)}: {size / 1e6:,.3f} MB") for name, size in result.files.items()]
    rows += [
        *zip(("preprocessing", "", "", ""), result.description["before_the_network"], strict=False),
        ("", _WHERE_RESIZED[result.format]),
        ("checked", f"with {result.pictures}:"),
        ("", f"{result.predicted} of {result.predicted} get the same {same} from the model and the file,"),
        ("", f"probabilities differ by up to {result.difference:.1e}"),
        ("time", f"{log.duration(result.seconds)} in all"),
    ]
    if result.format == "safetensors" and not result.description["build"]:
        hint = "only cvdist has this network; with --format onnx or pt2 it is in the file"
        return "\n".join([*console.aligned(rows), f"next: {hint}"])
    return "\n".join([*console.aligned(rows), "next, in Python, without cvdist:", "", snippet(result)])


def snippet(result: ExportResult) -> str:
    """Return Python code that classifies `photo.jpg` with the file, without this package."""
    about = result.description
    name, *beside = (PurePosixPath(uri).name if "://" in uri else uri for uri in result.files)
    lines = ["import json, numpy as np", *_picture(about)]
    if result.format == "onnx":
        lines[0] += ", onnxruntime"
        lines += [
            f"model = onnxruntime.InferenceSession({name!r})",
            f'about = json.loads(model.get_modelmeta().custom_metadata_map["{exported.KEY}"])',
            f'scores = model.run(None, {{"{exported.PIXELS}": pixels}})[0][0]',
        ]
    elif result.format == "pt2":
        lines[0] += ", torch"
        lines += [
            f'extra = {{"{exported.KEY}": ""}}',
            f"model = torch.export.load({name!r}, extra_files=extra).module()",
            f'about = json.loads(extra["{exported.KEY}"])',
            "scores = model(torch.tensor(pixels))[0].detach().numpy()",
        ]
    else:
        activation = "sigmoid()" if about["multilabel"] else "softmax(1)"
        lines[0] += f", torch, {about['build'].partition('.')[0]}, safetensors.torch"
        lines += [
            f"about = json.load(open({beside[0]!r}))",
            f"model = {about['build']}.eval()",
            f"model.load_state_dict(safetensors.torch.load_file({name!r}))",
            'mean, std = (np.float32(about[key])[:, None, None] for key in ("mean", "std"))',
            "scores = model(torch.tensor((pixels / 255 - mean) / std).float())"
            f".{activation}[0].detach().numpy()",
        ]
    if about["multilabel"]:
        lines += [
            'for name, score, least in zip(about["classes"], scores, about["thresholds"]):',
            "    if score >= least:",
            "        print(name, score)",
        ]
    else:
        lines.append('print(about["classes"][scores.argmax()], scores.max())')
    return "\n".join(f"    {line}" for line in lines)


def _picture(about: dict[str, Any]) -> list[str]:
    """Return lines of Python that read a picture into `pixels`, in the form that the model was trained with."""
    size, resize = (about["width"], about["height"]), about["resize"]
    mode = "RGB" if about["channels"] == 3 else "L"
    if resize == "squash":
        resized = f"picture.resize({size}, Image.Resampling.BILINEAR)"
    else:
        _, shorter, interpolation = resize.split(":") if ":" in resize else ("", size[0] * 8 / 7, "bilinear")
        margin = max(0.0, (1 - size[0] / float(shorter)) / 2)
        resized = f"ImageOps.fit(picture, {size}, Image.Resampling.{interpolation.upper()}, bleed={margin:.6g})"
    return [
        "from PIL import Image, ImageOps",
        f'picture = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")',
        f"pixels = np.atleast_3d({resized}).transpose(2, 0, 1)[None]",
    ]
