"""Compare pretrained networks on one set of pictures: caches, linear classifiers, one table."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvdist import config as configs
from cvdist import log, models, recipes, storage, tracking
from cvdist.config import (
    BackboneConfig,
    ClusterConfig,
    DataConfig,
    MixingConfig,
    ModelConfig,
    PreprocessConfig,
    ProbeConfig,
    TrainConfig,
)
from cvdist.data.images.ahead import BATCH
from cvdist.data.images.listing import require_one_class
from cvdist.distributed import device as devices
from cvdist.errors import UserError
from cvdist.evaluation.compare import mcnemar, wilson_interval
from cvdist.features import build
from cvdist.features import open as features
from cvdist.features.extract import Extractor
from cvdist.features.loader import FeatureLoader
from cvdist.figures.cost import NetworkCost, accuracy_by_cost
from cvdist.jobs import cli, console
from cvdist.jobs.preprocess import FEATURES_RECIPE, OF_THE_NODE, PreprocessResult, extraction_of, preprocess
from cvdist.jobs.train import absolute
from cvdist.models import InputSpec
from cvdist.parallel.measure import flops
from cvdist.runtime.environment import require_ray
from cvdist.runtime.signals import sigterm_raises
from cvdist.storage import Folder
from cvdist.tracking import RunRef, TrackingStore, environment, open_tracker
from cvdist.training import logistic_head, ridge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_CHANCE = 0.05  # a p-value from which on a difference is taken as chance
_WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")
# The most pictures, and the most seconds, with which a network's speed is measured.
_TIMED_PICTURES, _TIMED_SECONDS = 512, 3.0
_SHOWN_TIES = 10


@dataclass(frozen=True)
class Network:
    """A network that takes part.

    Attributes:
        name: What the comparison calls it.
        extraction: The settings of its feature cache.
        training: The settings of a training from that cache.
    """

    name: str
    extraction: PreprocessConfig
    training: TrainConfig


@dataclass(frozen=True)
class ProbedNetwork:
    """What was measured of a network.

    Attributes:
        network: The network.
        ridge: Which validation pictures the ridge classifier classifies correctly, bool (n,).
        logistic: Which ones logistic regression classifies correctly, bool (n,); None if the network was not
            among the best.
        left_out: How many training pictures the ridge classifier classifies correctly when it is fit without
            them.
        train_total: How many training pictures there are.
        pictures: Hexadecimal SHA-256 of the validation pictures' paths.
        pictures_per_second: Speed from files to features in this process; 0 if it can't be measured here.
        bytes_per_picture: Size of the cache, as stored, per picture.
        parameters: Number of parameters of the network with its new last layer.
        gflop: Multiply-adds per picture, in 1e9.
    """

    network: Network
    ridge: Tensor
    logistic: Tensor | None
    left_out: int
    train_total: int
    pictures: str
    pictures_per_second: float
    bytes_per_picture: float
    parameters: int
    gflop: float

    @property
    def name(self) -> str:
        """What the comparison calls it."""
        return self.network.name

    @property
    def right(self) -> Tensor:
        """Which validation pictures are right: those of logistic regression, if there is one, else of ridge."""
        return self.ridge if self.logistic is None else self.logistic

    @property
    def correct(self) -> int:
        """How many validation pictures are classified correctly."""
        return int(self.right.sum())


@dataclass(frozen=True)
class Comparison:
    """Two networks with one kind of classifier on the same pictures. p: the p-value of McNemar's test."""

    first: str
    second: str
    p: float

    @property
    def tied(self) -> bool:
        """Whether their difference is within chance."""
        return self.p >= _CHANCE


@dataclass(frozen=True)
class ProbeResult:
    """A finished comparison.

    Attributes:
        config: Its settings.
        networks: The networks, the most accurate one first.
        comparisons: All pairs of networks, in the same order.
        chosen: The cheapest network among the first one and those that are tied with it.
        hardware: Where the pictures per second were measured.
        run: The MLflow run that holds the results; None without one.
        seconds: From start to end.
    """

    config: ProbeConfig
    networks: tuple[ProbedNetwork, ...]
    comparisons: tuple[Comparison, ...]
    chosen: ProbedNetwork
    hardware: str
    run: RunRef | None
    seconds: float


def probe(config: ProbeConfig) -> ProbeResult:
    """Make or find each network's cache, fit classifiers to it, compare them, and log the results.

    Raises:
        UserError: for all that the user can correct, as early as it can be found.
        SystemExit: on SIGTERM; what is finished of the caches is kept.
    """
    began = time.monotonic()
    config = configs.replace(
        config,
        data=storage.absolute(config.data.uri) if config.data.uri else "",
        data_root=storage.absolute(config.data.root),
        features=storage.absolute(config.features.uri) if config.features.uri else "",
    )
    configs.check_probe(config)
    if config.runtime.launcher == "ray":
        require_ray("use --runtime inline")
    with sigterm_raises():
        device = devices.here(config.runtime.device_here)
        networks = _prepare(config, _named(config))
        logged_to = config.lookup.tracking(config.networks.tracking)
        store = tracking.open_tracking_store(logged_to, config.lookup.storage)
        probed = [_probe(network, device) for network in networks]
        best = sorted(probed, key=lambda one: -one.left_out)[: config.networks.finalists]
        finalists = {one.name for one in best}
        probed = [_solved(one, device) if one.name in finalists else one for one in probed]
        result = compare(config, probed, devices.describe(device), time.monotonic() - began)
        if store is not None:
            result = dataclasses.replace(result, run=_log(store, result))
    return dataclasses.replace(result, seconds=time.monotonic() - began)


# ----------------------------------------------------------------------------------------------- networks


def _named(config: ProbeConfig) -> list[tuple[str, BackboneConfig]]:
    """Return the name of each network of `--models` in the comparison, and the network with its weights."""
    words = [word.strip() for word in config.networks.names.split(",") if word.strip()]
    found = []
    for word in words:
        name, _, weights = word.partition(":")
        # The label names a folder, so it has the weights' file name only, without a path.
        stem = PurePosixPath(weights).name.removesuffix(PurePosixPath(weights).suffix)
        label = "-".join(re.sub(r"[^\w.-]", "-", part) for part in (name, stem) if part)
        found.append((label, BackboneConfig(name=name, weights=weights)))
    labels = [label for label, _ in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"--models names {', '.join(twice)} twice: once is enough")
    return found


def _prepare(config: ProbeConfig, named: Sequence[tuple[str, BackboneConfig]]) -> list[Network]:
    """Check pictures, networks, weights and caches of all networks, before the first one is run.

    Raises:
        UserError: one line that names every network that can't be used, and why.
    """
    files = (
        Folder.open(config.networks.weights_dir, "--weights-dir").sizes() if config.networks.weights_dir else {}
    )
    problems = []
    for name, model in named:  # before weights are downloaded for another one
        try:
            models.find(model.name)
        except UserError as error:
            problems.append(f"--models {name}: {error}")
    require_one_class(config.data, "probe.py")
    found = []
    for name, model in [] if problems else named:
        try:
            if not model.weights:
                weights = file_of(model.name, files, config.networks.weights_dir)
                model = dataclasses.replace(model, weights=weights)
            model = dataclasses.replace(model, weights=storage.absolute_if_there(model.weights))
            if models.needs_normalization(model):
                stated = config.networks.weights_preprocessing
                model = dataclasses.replace(model, weights_preprocessing=stated)
            network = network_of(config, name, _with_linear_head(models.prepare_with_cut(model)))
            build.check(models.with_preprocessing(network.extraction))
            found.append(network)
        except UserError as error:
            problems.append(f"--models {name}: {error}")
    if problems:
        raise UserError("; ".join(problems))
    return found


def _with_linear_head(model: BackboneConfig) -> BackboneConfig:
    """Return `model`, but with its maps if its own last layer, such as a convolution, can't be solved for."""
    whole = ModelConfig(name=model.name, features_at=model.features_at, head="linear")
    trained = models.frozen_and_trained(models.skeleton(whole)).trained
    linear = logistic_head.linear_layer(trained) is not None
    return model if linear else dataclasses.replace(model, features_at="maps")


def file_of(name: str, files: dict[str, int], folder: str) -> str:
    """Return the file of a network's weights in `--weights-dir`, or the name of the library's own weights.

    Raises:
        UserError: if there is no such file, or several.
    """
    if not folder:
        return "DEFAULT"
    known = {other.replace("/", "-") for other in [*models.names(), name]}

    def belongs_to(stem: str) -> str:  # vgg16_bn.pth belongs to vgg16_bn, though it begins with vgg16
        begins = [other for other in known if re.match(rf"{re.escape(other)}($|[-_.])", stem)]
        return max(begins, key=len, default="")

    weights = [file for file in files if "/" not in file and file.endswith(_WEIGHTS)]
    mine = [file for file in weights if belongs_to(file.rpartition(".")[0]) == name.replace("/", "-")]
    if len(mine) == 1:
        return f"{folder.rstrip('/')}/{mine[0]}"
    if mine:
        raise UserError(f"--weights-dir {folder} has {', '.join(sorted(mine))}: name one, --models {name}:FILE")
    there = ", ".join(sorted(weights)[:5]) or "none at all"
    raise UserError(
        f"--weights-dir {log.redact(folder)} has no file {name.replace('/', '-')}.pth or the like (its "
        f"files: {there}): name it, --models {name}:FILE, or download it, --models {name}:DEFAULT"
    )


def network_of(config: ProbeConfig, name: str, model: BackboneConfig) -> Network:
    """Build the settings of the network's cache and of a training from it."""
    place = f"{config.caches}/{name}"
    recipe = recipes.find(FEATURES_RECIPE)
    extraction = dataclasses.replace(extraction_of(config, model, place), augmentation=config.augmentation)
    asked = {field: getattr(model, field) for field in ("name", "weights", "weights_preprocessing")}
    at = model.features_at if model.cut != recipe.model.cut else recipe.model.features_at
    # One process is enough for a fit, wherever it runs.
    runtime = {"num_workers": 1} if config.runtime.launcher == "ray" else {"launcher": config.runtime.launcher}
    runtime |= vars(configs.part_of(ClusterConfig, config.runtime)) | {"device": config.runtime.device}
    lookup = config.lookup
    training = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **asked, features_at=at),
        features=dataclasses.replace(recipe.features, uri=place, views=config.features.views),
        data=configs.part_of(DataConfig, config.data),
        augmentation=MixingConfig(**vars(config.augmentation)),
        runtime=dataclasses.replace(recipe.runtime, **runtime),
        run=dataclasses.replace(recipe.run, storage=lookup.storage),
        tracking=lookup.tracking(config.networks.tracking),
    )
    return Network(name, extraction, training)


# ---------------------------------------------------------------------------------------------- measuring


def _probe(network: Network, device: torch.device) -> ProbedNetwork:
    """Make or find the network's cache, fit the ridge classifier to it, and measure the network."""
    logger.info("network    %s: weights %s", network.name, log.redact(network.extraction.model.weights))
    made = preprocess(network.extraction)
    loader = _open(network, device)
    line = log.ProgressLine(logger, enabled=True)
    with torch.no_grad():
        sums = ridge.add_up(loader, 0, 1, device, line)
        fit, left_out = ridge.leave_one_out(sums, loader, 0, 1, line)
        right = ridge.classify(fit, loader, 0, 1, line)
    model = _without_values(network, loader)
    info, cache = loader.info, made.built.manifest
    probed = ProbedNetwork(
        network=network,
        ridge=right,
        logistic=None,
        left_out=left_out.correct,
        train_total=left_out.total,
        pictures=hashlib.sha256("\n".join(loader.names("valid", range(len(right)))).encode()).hexdigest(),
        pictures_per_second=_pictures_per_second(made, loader, device),
        bytes_per_picture=cache.stored_bytes / max(cache.index.rows - len(cache.bad), 1),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        # The counter counts two operations for each multiply-add.
        gflop=flops(model.requires_grad_(False), (info.channels, info.height, info.width))[0] / 2e9,
    )
    loader.copy.close()
    logger.info(
        "network    %s: %s by the ridge classifier, %s of training pictures when left out",
        network.name,
        log.percent(probed.correct, len(right)),
        log.percent(left_out.correct, left_out.total),
    )
    return probed


def _open(network: Network, device: torch.device) -> FeatureLoader:
    return features.load(absolute(network.training), device, 1)


def _without_values(network: Network, loader: FeatureLoader) -> torch.nn.Module:
    """Build the network with a linear layer for these classes, with shapes only and no values."""
    info = loader.info
    input = InputSpec(info.channels, info.height, info.width)
    return models.skeleton(network.training.model, len(info.classes), input)


def _pictures_per_second(made: PreprocessResult, loader: FeatureLoader, device: torch.device) -> float:
    """Measure pictures per second, from files to features, on some of the pictures in this process."""
    config, mark = made.config, made.built.manifest.fingerprint
    if mark.decoder != "cpu" and device.type == "cpu":
        return 0.0
    paths = loader.names("valid", range(min(loader.info.valid_size, _TIMED_PICTURES)))
    paths += loader.names("train", range(min(loader.info.train_size, _TIMED_PICTURES - len(paths))))
    extractor = Extractor(config, mark, device, decode_threads=config.data.decode_workers)

    def rate(some: list[str]) -> float:
        began = time.monotonic()
        extractor.compute(some, 1)
        return len(some) / (time.monotonic() - began)

    few = paths[: BATCH[device.type]]
    rate(few)  # the first run of a network takes longer
    found = rate(few)
    more = paths[: int(found * _TIMED_SECONDS)]
    return rate(more) if len(more) > len(few) else found


def _solved(probed: ProbedNetwork, device: torch.device) -> ProbedNetwork:
    """Fit the logistic regression that a training from the cache would result in."""
    network, loader = probed.network, _open(probed.network, device)
    line = log.ProgressLine(logger, enabled=True)

    def after_pass(doing: str, passes: int) -> None:
        if line.due():
            line.show(f"{network.name}: logistic regression, {doing}, {passes} passes over the features")

    trained = models.frozen_and_trained(_without_values(network, loader)).trained
    seed, right = network.training.run.seed, torch.zeros_like(probed.ridge)
    with torch.no_grad():
        fit = logistic_head.solve(loader, trained, device, seed=seed, after_pass=after_pass)
        inputs, weight, bias = logistic_head.inputs_of(trained), fit.weight.float(), fit.bias.float()
        for batch in loader.valid_batches(0, 1, network.training.loop.valid_batch_size):
            scores = torch.nn.functional.linear(inputs(batch.images), weight, bias)
            right[batch.indices] = (scores.argmax(1) == batch.labels).cpu()
    line.clear()
    loader.copy.close()
    found = log.percent(int(right.sum()), len(right))
    logger.info("network    %s: %s by logistic regression, penalty %.2g", network.name, found, fit.penalty)
    return dataclasses.replace(probed, logistic=right)


def compare(config: ProbeConfig, probed: Sequence[ProbedNetwork], hardware: str, seconds: float) -> ProbeResult:
    """Sort the networks, compare all pairs of them, and choose the one to train.

    Raises:
        UserError: if the pictures have changed from one network to the next.
    """
    if len({one.pictures for one in probed}) > 1:
        raise UserError("the pictures of --data have changed in the meantime: run the same command again")
    ordered = sorted(probed, key=lambda one: (-one.correct, -one.left_out, one.gflop))
    pairs = []
    for one, other in itertools.combinations(ordered, 2):
        both = one.logistic is not None and other.logistic is not None
        mine, theirs = (one.right, other.right) if both else (one.ridge, other.ridge)
        p = mcnemar(int((mine & ~theirs).sum()), int((~mine & theirs).sum()))
        pairs.append(Comparison(one.name, other.name, p))
    tied = {ordered[0].name, *(pair.second for pair in pairs if pair.first == ordered[0].name and pair.tied)}
    chosen = min((one for one in ordered if one.name in tied), key=lambda one: one.gflop)
    return ProbeResult(config, tuple(ordered), tuple(pairs), chosen, hardware, None, seconds)


# ------------------------------------------------------------------------------------------------- MLflow


def _log(store: TrackingStore, result: ProbeResult) -> RunRef:
    """Log the results as a run, end the run, and return it."""
    config = result.config
    data = PurePosixPath(log.redact(config.data.uri)).name
    tags = {"cvdist.kind": "probe", "cvdist.chosen": result.chosen.name, **environment.run_tags()}
    run = tracking.create_run(store, f"probe of {data}", tags)
    with tracking.end_run_on_exit(run):
        tracker = open_tracker(run, 0, 0, "")
        tracker.log_params(dict(configs.flat(config)))
        rows = [_values(one) for one in result.networks]
        metrics = {
            f"{row['network']}/{name}": float(value)
            for row in rows
            for name, value in row.items()
            if not isinstance(value, str)
        }
        metrics |= {f"{pair.first}/mcnemar_p/{pair.second}": pair.p for pair in result.comparisons}
        tracker.log_metrics(metrics, step=0)
        tracker.log_figure("accuracy_by_cost", lambda: figure(result))
        tracker.log_text("networks.csv", _csv(rows))
        tracker.log_text("networks.txt", "\n".join([*_networks(result), "", *_verdict(result), ""]))
        tracker.close()
        lines = [f"### {result.chosen.name}", "", f"`{environment.command()}`", "", *_verdict(result)]
        lines += ["", "Next:", "", f"    {next_command(result)}"]
        tracking.set_description(run, "\n".join(lines))
    return run


def _values(one: ProbedNetwork) -> dict[str, str | float]:
    """Return what was measured of a network, by name."""
    total = len(one.ridge)
    low, high = wilson_interval(one.correct, total)
    solved: dict[str, float] = {} if one.logistic is None else {"logistic_correct": int(one.logistic.sum())}
    return {
        "network": one.name,
        "valid_total": total,
        "valid_accuracy": one.correct / total,
        "valid_accuracy_low": low,
        "valid_accuracy_high": high,
        "ridge_correct": int(one.ridge.sum()),
        **solved,
        "left_out_correct": one.left_out,
        "left_out_total": one.train_total,
        "pictures_per_second": one.pictures_per_second,
        "bytes_per_picture": one.bytes_per_picture,
        "parameters": one.parameters,
        "gflop": one.gflop,
    }


def _csv(rows: Sequence[dict[str, str | float]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def figure(result: ProbeResult) -> Figure:
    """Draw the networks' accuracy against their cost."""
    networks = [
        NetworkCost(
            one.name,
            one.correct,
            total := len(one.right),
            wilson_interval(one.correct, total),
            one.gflop,
            one.logistic is not None,
        )
        for one in result.networks
    ]
    data = PurePosixPath(log.redact(result.config.data.uri)).name
    subtitle = (
        f"{log.percent(result.chosen.correct, len(result.chosen.right))} of the validation pictures of {data}"
    )
    return accuracy_by_cost(networks, f"To train: {result.chosen.name}", subtitle)


# ----------------------------------------------------------------------------------------------- printing


def table(result: ProbeResult) -> str:
    """Format a row for each network, which of them are tied, and the command that trains the chosen one."""
    first, config = result.networks[0], result.config
    rows = [
        ("data", f"{log.redact(config.data.uri)}: {first.train_total:,} pictures for training, "
                 f"{len(first.ridge):,} for validation"),
        ("features", log.redact(config.caches)),
        ("pictures/s", f"from files to features in this process, on {result.hardware}"),
        ("time", f"{log.duration(result.seconds)} in all"),
        *console.mlflow_row(result.run),
    ]  # fmt: skip
    lines = [*console.aligned(rows), *_networks(result), ""]
    if result.comparisons:
        lines += [*(f"  {line}" for line in _verdict(result)), ""]
    return "\n".join([*lines, f"next: {next_command(result)}"])


def _networks(result: ProbeResult) -> list[str]:
    """Format the table of networks as lines."""
    header = [
        *("network", "logistic", "95% interval", "ridge", "95% interval", "leave-one-out"),
        *("pictures/s", "bytes", "parameters", "GFLOP"),
    ]
    rows = []
    for one in result.networks:
        rate = f"{one.pictures_per_second:,.1f}" if one.pictures_per_second else "-"
        rows.append(
            [
                one.name,
                *(["-", "-"] if one.logistic is None else _counted(one.logistic)),
                *_counted(one.ridge),
                log.percent(one.left_out, one.train_total),
                *(rate, f"{one.bytes_per_picture:,.0f}", f"{one.parameters:,}", f"{one.gflop:.2f}"),
            ]
        )
    return console.columns(header, rows)


def _counted(right: Tensor) -> list[str]:
    """Format an accuracy as `99.00% (396/400)`, with its interval."""
    correct, total = int(right.sum()), len(right)
    low, high = wilson_interval(correct, total)
    return [log.percent(correct, total), f"{100 * low:.2f}-{100 * high:.2f}%"]


def _verdict(result: ProbeResult) -> list[str]:
    """Say which networks are tied, and why the chosen one was chosen."""
    best, pairs = result.networks[0].name, result.comparisons
    if not pairs:
        return []
    with_best = [pair for pair in pairs if pair.first == best and pair.tied]
    others = [pair for pair in pairs if pair.first != best and pair.tied]
    if not with_best:
        lines = [f"{best} is better than the others: McNemar's exact test, p < {_CHANCE:g} for each"]
    else:
        tied = ", ".join(f"{pair.second} (p = {pair.p:.2g})" for pair in with_best)
        lines = [f"tied with {best}, within chance by McNemar's exact test: {tied}"]
        if result.chosen.name != best:
            lines.append(f"{result.chosen.name} takes the fewest operations of these")
    if others:
        shown = [f"{pair.first} and {pair.second} (p = {pair.p:.2g})" for pair in others[:_SHOWN_TIES]]
        more = len(others) - len(shown)
        lines.append(f"tied as well: {', '.join(shown)}{f' and {more} more pairs' if more else ''}")
    return lines


def next_command(result: ProbeResult) -> str:
    """Return the command that trains the chosen network from its cache."""
    mine, usual = result.chosen.network.training, recipes.find(FEATURES_RECIPE)
    flags = f" --model {mine.model.name}" + cli.flags(mine.model, usual.model, leave_out=("name",))
    flags += cli.flags(mine.features, usual.features)
    flags += cli.flags(mine.data, usual.data, leave_out=OF_THE_NODE)
    for group in ("augmentation", "runtime", "run", "tracking"):
        flags += cli.flags(getattr(mine, group), getattr(usual, group))
    return f"{cli.command('train')} {FEATURES_RECIPE}{flags}"
