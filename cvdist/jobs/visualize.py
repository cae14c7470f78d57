"""Draw the figures of a trained model, and write them to its run or a folder."""

from __future__ import annotations

import functools
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cvdist import config as configs
from cvdist import loaders, log, storage, tracking
from cvdist.config import DataConfig, LookConfig, PicturesConfig, RuntimeConfig, TableConfig, VisualizeJobConfig
from cvdist.data import forms
from cvdist.data.forms import NO_PART, VALID_PART, archives, root_of
from cvdist.data.forms.folders import split_folders
from cvdist.data.forms.label_text import classes_in
from cvdist.data.forms.table import is_table, require_unused
from cvdist.data.images import as_split_in_training
from cvdist.data.images.ahead import Reader
from cvdist.data.images.decode import to_gray
from cvdist.data.images.listing import list_pictures
from cvdist.data.labels import NO_CLASS, label_names, labels_of
from cvdist.data.normalize import Normalizer
from cvdist.distributed import device as devices
from cvdist.errors import UserError
from cvdist.figures import network
from cvdist.hardware import usable_cores
from cvdist.interpret.interpretation import Interpretation, Limits, PictureSource, interpret_model
from cvdist.interpret.layers import ConvLayer, select_layers
from cvdist.jobs import console
from cvdist.jobs.report import log_report_or_warn
from cvdist.log import redact
from cvdist.saved import SavedModel, open_model
from cvdist.seeding import generator
from cvdist.storage import Folder
from cvdist.training.visualize import ValidationPictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


Made = Callable[[], bytes]


@dataclass(frozen=True)
class VisualizeResult:
    """A finished visualization.

    Args:
        model: the model in words.
        layers: the convolutions that were looked into.
        interpretation: what was found with pictures; None without pictures.
        pictures: which pictures these were, in words.
        bad: the pictures that can't be decoded.
        files: names of the figures.
        output: folder or URI of the figures; empty: they are only among the run's artifacts.
        run: the model's MLflow run; None without one.
        seconds: from start to end.
    """

    model: str
    layers: list[ConvLayer]
    interpretation: Interpretation | None
    pictures: str
    bad: list[str]
    files: list[str]
    output: str
    run: tracking.RunRef | None
    seconds: float


def visualize(config: VisualizeJobConfig) -> VisualizeResult:
    """Draw all figures of the model, into its run or a folder.

    Raises:
        UserError: for all that the user can correct: no such model, layer or picture, or nowhere to write to.
    """
    started = time.monotonic()
    look = config.look
    configs.check_groups(config)
    configs.require_outside(look.root or look.data, output=look.output)
    saved = open_model(config.saved)
    layers = select_layers(saved.model, look.layers)
    output = look.output or ("" if saved.run else "figures")
    if output:
        storage.check_writable(output, "--output")
    pictures = find_pictures(saved, look, look.data, look.most_pictures, config.saved.storage)
    logger.info("model      %s, %s", saved.source, saved.identity)
    logger.info("layers     %s", ", ".join(layer.name for layer in layers))
    logger.info("pictures   %s", pictures.words if pictures else "none: filters only (--data names some)")
    result = _interpret(saved, layers, pictures, look) if pictures else None
    drawings = dict(_drawings(layers, result, pictures, look))
    files = _write(drawings, output, saved.run)
    if saved.run is not None:
        log_report_or_warn(saved.run, ended=False)
    return VisualizeResult(
        model=f"{saved.source}, {saved.identity}",
        layers=layers,
        interpretation=result,
        pictures=pictures.words if pictures else "none",
        bad=pictures.bad if pictures else [],
        files=files,
        output=output,
        run=saved.run,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class SamplePictures:
    """Pictures to run a model over: their source, which they are in words, and those that can't be decoded."""

    source: PictureSource
    words: str
    bad: list[str]


class Decoded:
    """Pictures in memory (`cvdist.interpret.interpretation.PictureSource`)."""

    def __init__(self, pixels: Tensor, labels: Sequence[str], available: int) -> None:
        """Take pictures as `pixels`, uint8 (n, C, H, W); `available`: how many these were chosen from."""
        self.size, self.available = len(pixels), available
        self._pixels, self._labels = pixels, labels

    def read(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Return pixels, uint8 (n, C, H, W), and labels of the pictures with these numbers."""
        return self._pixels[list(rows)], [self._labels[row] for row in rows]


def _interpret(
    saved: SavedModel, layers: Sequence[ConvLayer], pictures: SamplePictures, look: LookConfig
) -> Interpretation:
    device = devices.here(look.device)
    line = log.ProgressLine(logger, enabled=True)

    def progress(done: int, of: int) -> None:
        if line.due():
            line.show(f"{done}/{of} pictures through the network")

    model = saved.model.to(device).to(memory_format=torch.channels_last)
    result = interpret_model(
        model,
        pictures.source,
        saved.identity.classes,
        Normalizer(saved.mean, saved.std, device, channels_last=True),
        device,
        layers,
        Limits(pictures=look.most_pictures, maps=look.pictures),
        has_classifier=saved.has_classifier,
        multilabel=saved.identity.multilabel,
        progress=progress,
    )
    line.clear()
    return result


# ------------------------------------------------------------------------------------------------ pictures


def find_pictures(
    saved: SavedModel, columns: TableConfig, named: str, limit: int, run_storage: str
) -> SamplePictures | None:
    """Find the pictures that `--data` names, else those that the model's run was validated with, else None.

    Args:
        saved: the model.
        columns: what the columns of a table in `--data` hold.
        named: `--data`, or empty.
        limit: how many pictures are decoded at most.
        run_storage: the value of `RunConfig.storage`.

    Raises:
        UserError: if `--data` has no pictures that can be decoded.
    """
    if named:
        size, resize = saved.identity.height, saved.learned_resize()
        data = PicturesConfig(uri=named, **vars(configs.part_of(TableConfig, columns)))
        found = _listed(data, saved.identity.classes if saved.has_classifier else None)
        return _decoded(root_of(data), found, limit, saved, size, resize)
    if saved.data is None:
        return None
    if saved.data.dataset == "images" and not saved.data.uri:  # trained from a cache of features alone
        logger.warning("pictures   the run does not say where its pictures are: --data names them")
        return None
    try:
        return _of_the_run(saved, saved.data, limit, run_storage)
    except UserError as error:
        logger.warning("pictures   those of the run can't be had: %s", error)
        return None


def _of_the_run(saved: SavedModel, data: DataConfig, limit: int, run_storage: str) -> SamplePictures:
    if data.dataset == "images":
        listing = list_pictures(data)
        part = np.asarray(listing.table.column("part"))
        if (part == NO_PART).all():
            waits = RuntimeConfig()
            both = as_split_in_training(data, timeout=waits.prepare_timeout, data_timeout=waits.data_timeout)
            table = both["valid"]
        else:  # listed instead of decoded whole: a few hundred pictures are enough
            table = listing.table.filter(pa.array(part == VALID_PART))
        names = label_names(labels_of(table, len(listing.classes)), listing.classes)
        found = list(zip(table.column("path").to_pylist(), names, strict=True))
        return _decoded(root_of(data), found, limit, saved, data.image_size, data.resize)
    loader = loaders.open_in_memory(data, run_storage, torch.device("cpu"))
    source = ValidationPictures(loader)
    return SamplePictures(source, f"{loader.info.name}, the {source.size:,} validation pictures of the run", [])


def _listed(data: PicturesConfig, classes: Sequence[str] | None) -> list[tuple[str, str]]:
    """List each picture's path below the root (empty: `--data` is the file itself) and class (empty: unknown).

    `classes` are those of the model. None: it has none, and the folders' names say what a picture shows.
    """
    if is_table(data.uri) or archives.are_named(data.uri):
        table = forms.look(data)
        held_back = next((name for name, part in table.parts.items() if part == VALID_PART), "")
        rows = table.table.filter(pc.equal(table.table["split"], held_back)) if held_back else table.table
        named = zip(rows["path"].to_pylist(), rows["label"].to_pylist(), strict=True)
        return [
            (path, _known(classes_in(label, multilabel=table.multilabel), classes)) for path, label in named
        ]
    require_unused(data.uri, data)
    filesystem, path = storage.locate(data.uri, "--data")
    if storage.is_file(filesystem, path):
        return [("", _class_of("", str(PurePosixPath(path).parent), classes))]
    found = forms.look_unlabeled(data.uri)["path"]
    held_back = next((name for name, part in split_folders(found).items() if part == VALID_PART), "")
    paths = found.filter(pc.starts_with(found, f"{held_back}/" if held_back else "")).to_pylist()
    return [(path, _class_of(path, data.uri, classes)) for path in paths]


def _known(labels: Sequence[str], classes: Sequence[str] | None) -> str:
    """Join the labels of a picture that the model knows, as `label_names` does; empty if it knows none."""
    known = [name for name in labels if classes is None or name in classes]
    return ", ".join(known) or ("" if labels else NO_CLASS)


def _class_of(path: str, uri: str, classes: Sequence[str] | None) -> str:
    """Return the name of the innermost folder that is a class, or an empty text."""
    parts = [*PurePosixPath(uri.partition("://")[2] or uri).parts[-1:], *PurePosixPath(path).parts[:-1]]
    if classes is None:
        return parts[-1]
    return next((part for part in reversed(parts) if part in classes), "")


def _decoded(
    uri: str, found: list[tuple[str, str]], limit: int, saved: SavedModel, size: int, resize: str
) -> SamplePictures:
    """Decode up to `limit` pictures, chosen with a fixed seed, into memory: 150 kB each at 224 pixels."""
    order = torch.randperm(len(found), generator=generator("pictures of a folder")).tolist()[:limit]
    chosen = [found[row] for row in sorted(order)]
    reader = Reader(uri, size, resize)

    def load(path: str) -> Tensor | str:
        try:
            (one,) = reader.decode([path])
        except UserError as error:
            return str(error)
        return one.pixels if one.pixels is not None else f"{path or uri}: {one.reason}"

    with ThreadPoolExecutor(usable_cores()) as pool:
        loaded = list(pool.map(load, [path for path, _ in chosen]))
    bad = [reason for reason in loaded if isinstance(reason, str)]
    good = [
        (pixels, name) for pixels, (_, name) in zip(loaded, chosen, strict=True) if isinstance(pixels, Tensor)
    ]
    if not good:
        what = "the picture can't" if len(bad) == 1 else f"none of {len(bad)} pictures can"
        raise UserError(f"--data {redact(uri)}: {what} be decoded ({redact(bad[0])})")
    for reason in bad:
        logger.warning("pictures   left out, it can't be decoded: %s", redact(reason))
    pixels = torch.stack([pixels for pixels, _ in good]).permute(0, 3, 1, 2)
    if saved.identity.channels == 1:
        pixels = to_gray(pixels).to(torch.uint8)
    source = Decoded(pixels.contiguous(), [name for _, name in good], len(found) - len(bad))
    many = f"{len(good):,} of {len(found):,} pictures" if len(good) < len(found) else f"{len(good):,} pictures"
    return SamplePictures(source, f"{many} in {redact(uri)}", bad)


# ----------------------------------------------------------------------------------------------- drawings


def _drawings(
    layers: Sequence[ConvLayer],
    result: Interpretation | None,
    pictures: SamplePictures | None,
    look: LookConfig,
) -> Iterator[tuple[str, Made]]:
    """Yield the name of each file below `figures/`, and the function that makes its content."""
    for layer in layers:
        grid = functools.partial(network.filter_figure, layer.name, layer.weight, look.channels)
        yield f"filters/{layer.name}.png", functools.partial(_png, grid)
        if network.small_enough_for_svg(layer):
            yield f"filters/{layer.name}.svg", functools.partial(network.filters_svg, layer.name, layer.weight)
    if result is not None and pictures is not None:
        for name, draw in network.interpretation_figures(result, pictures.source).items():
            yield f"{name}.png", functools.partial(_png, draw)


def _png(draw: Callable[[], Figure]) -> bytes:
    from cvdist.figures.style import save_png

    file = io.BytesIO()
    save_png(draw(), file)
    return file.getvalue()


def _write(drawings: dict[str, Made], output: str, run: tracking.RunRef | None) -> list[str]:
    """Draw and write the figures one by one. Returns their names below `output` or the run's `figures/`."""
    folder = Folder.open(output, "--output") if output else None
    line = log.ProgressLine(logger, enabled=True)
    for number, (name, make) in enumerate(drawings.items(), start=1):
        content = make()
        if folder is not None:
            folder.write(name, content)
        if run is not None:
            tracking.log_file(run, f"figures/{name}", content)
        if line.due():
            line.show(f"{number}/{len(drawings)} figures")
    line.clear()
    return list(drawings)


# ----------------------------------------------------------------------------------------------- printing


def table(result: VisualizeResult) -> str:
    """Format what was looked at, where the figures are, and how to see them."""
    found = result.interpretation
    rows = [
        ("model", result.model),
        ("layers", ", ".join(layer.name for layer in result.layers)),
        ("pictures", result.pictures),
    ]
    if result.bad:
        rows.append(("left out", f"{len(result.bad)} can't be decoded, e.g. {redact(result.bad[0])}"))
    if found is not None:
        dead = [f"{len(gone)}/{_channels(result, name)} in {name}" for name, gone in found.dead.items() if gone]
        if found.dead:  # counted only for layers that ReLU or ReLU6 follows
            rows.append(("dead channels", f"{', '.join(dead) or 'none'}, over {found.seen} pictures"))
        if found.has_classifier and found.num_correct + found.num_wrong:
            total = found.num_correct + found.num_wrong
            rows.append(("predictions", f"{log.percent(found.num_correct, total)} right"))
    rows += [
        ("figures", f"{len(result.files)} in {_where(result)}"),
        ("time", f"{log.duration(result.seconds)} in all"),
    ]
    return "\n".join([*console.aligned(rows), f"next: {_next(result)}"])


def _next(result: VisualizeResult) -> str:
    """Return the line that tells what to do next."""
    if result.interpretation is None:
        return "the same with --data PICTURES, to see activations, top activations and Grad-CAM"
    if result.run is not None:
        return f"open {console.page_after(result.run)}, whose report.html has the new figures"
    first = next((name for name in result.files if name.startswith("gradcam/")), result.files[0])
    return f"open {result.output.rstrip('/')}/{first}; docs/seeing.md tells how to read them"


def _channels(result: VisualizeResult, name: str) -> int:
    return next(layer.module.out_channels for layer in result.layers if layer.name == name)


def _where(result: VisualizeResult) -> str:
    """Say in words where the figures are."""
    places = []
    if result.output:
        output = result.output
        places.append(redact(output) if "://" in output else str(Path(output).resolve()))
    if result.run is not None:
        places.append("the run's artifacts, figures/")
    return " and ".join(places)
