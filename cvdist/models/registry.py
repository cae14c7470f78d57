"""The registry of models: builds them by name, and checks that pictures and settings fit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn

from cvdist.config import BackboneConfig, FeaturesAt, Head, ModelConfig
from cvdist.errors import UserError, did_you_mean
from cvdist.models.cutting import WithoutValues
from cvdist.models.frozen import FrozenBackbone
from cvdist.results import ModelIdentity


@dataclass(frozen=True)
class InputSpec:
    """Shape of one picture: channels, and height and width in pixels."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be built.

    Attributes:
        name: its name, for `--model`.
        default_input: shape of the pictures that it was designed for; `check` says what else it takes.
        problem: returns why it can't take pictures of a shape, as a verb and its object; empty if it can.
        build: builds the model from (input, number of classes, settings), with weights on the default device.
            The model takes float (n, channels, height, width), where n may be 0, and returns scores (n, number
            of classes), whose softmax gives the probabilities. Log-probabilities are such scores too.
        any_channels: whether it can be built for any number of channels, or only for those of default_input.
        stages: returns how many stages it has that can be frozen (`--weights`, `--trainable-stages`). None if
            it can't start from pretrained weights.
        build_frozen: builds only the frozen layers with their weights, for pictures of a height and width in
            pixels; None if the settings freeze none.
    """

    name: str
    default_input: InputSpec
    problem: Callable[[InputSpec], str]
    build: Callable[[InputSpec, int, ModelConfig], nn.Module]
    any_channels: bool = True
    stages: Callable[[], int] | None = None
    build_frozen: Callable[[int, ModelConfig], FrozenBackbone | None] | None = None

    def check(self, input: InputSpec) -> None:
        """Check that the model can be built for pictures of this shape.

        Raises:
            UserError: if not, in one line that says what the model takes.
        """
        takes = self.default_input.channels
        if input.channels != takes and not self.any_channels:
            raise UserError(
                f"--model {self.name} takes pictures of {takes} channels, these have {input.channels}: use "
                "color pictures or another model"
            )
        if problem := self.problem(input):
            raise UserError(f"--model {self.name} {problem}: set --image-size, or use another model")

    def check_settings(self, settings: ModelConfig) -> None:
        """Check that the settings make sense for this model and none of them would be ignored.

        Raises:
            UserError: if not, in one line that names the flag.
        """
        if self.stages is not None:
            stages, given = self.stages(), settings.trainable_stages
            if given == "all" or (settings.weights == "none" and given == 0):
                given = stages
            if not settings.has_weights and int(given) < stages:
                raise UserError(
                    f"--model {self.name} without --weights would freeze layers that are random: name "
                    "--weights, or train all of them with --weights none"
                )
            if settings.head == "linear" and settings.hidden_size:
                raise UserError(
                    f"--hidden-size {settings.hidden_size} is for --head vgg and mlp, the linear head has no "
                    "hidden layer: leave it out, or choose one of these"
                )
            return
        pretraining = {
            "weights": settings.has_weights,
            "trainable-stages": settings.trainable_stages not in (0, "all"),
            "features-at": bool(settings.features_at),
            "head": settings.head != ModelConfig.head,
            "hidden-size": settings.hidden_size > 0,
        }
        for flag, given in pretraining.items():
            if given:
                raise UserError(
                    f"--{flag} is for models that go on from pretrained weights, not for --model {self.name}: "
                    "leave it out, or choose a classifier of torchvision, such as mobilenet_v2 or vgg16"
                )


MODELS: dict[str, ModelSpec] = {}


class Library(NamedTuple):
    """Models that are not registered one by one.

    Attributes:
        names: returns the names of those that the library lists.
        describe: returns the entry of a model; None if the library has none of this name.
    """

    names: Callable[[], Collection[str]]
    describe: Callable[[str], ModelSpec | None]


_LIBRARIES: list[Library] = []


def register(spec: ModelSpec) -> None:
    """Add a model to the registry.

    Raises:
        ValueError: if there is a model with this name already.
    """
    if spec.name in MODELS:
        raise ValueError(f"a model named {spec.name!r} is registered already")
    MODELS[spec.name] = spec


def register_library(library: Library) -> None:
    """Add the models of a library, which is asked only for names that are not registered."""
    _LIBRARIES.append(library)


def names() -> list[str]:
    """Return the names of all models."""
    return [*MODELS, *(name for library in _LIBRARIES for name in library.names())]


def find(name: str) -> ModelSpec:
    """Return the registry's entry for `name`.

    Raises:
        UserError: if there is none; the message lists similar names, or all.
    """
    if name in MODELS:
        return MODELS[name]
    for library in _LIBRARIES:
        if (spec := library.describe(name)) is not None:
            return spec
    own = f"--model takes {', '.join(MODELS)}, and the classifiers of torchvision, such as resnet50"
    raise UserError(f"unknown model {name!r}: {did_you_mean(name, names(), own)}")


def build_model(
    settings: ModelConfig, input: InputSpec, num_classes: int, *, multilabel: bool = False
) -> nn.Module:
    """Build a new model.

    Random weights come from PyTorch's global generator, so seed that first.

    Args:
        settings: name and settings of the model.
        input: shape of the pictures.
        num_classes: number of outputs.
        multilabel: whether each output is the score of a class by itself, whose sigmoid is its probability.

    Raises:
        UserError: if there is no such model, or it can't be built for these pictures or settings.
    """
    spec = find(settings.name)
    spec.check(input)
    spec.check_settings(settings)
    return _scoring(spec.build(input, num_classes, settings), multilabel)


def _scoring(model: nn.Module, multilabel: bool) -> nn.Module:
    """Remove a last layer that makes probabilities add up to 1, if each class is to have its own."""
    if multilabel and isinstance(model, nn.Sequential) and hasattr(model, "log_softmax"):
        del model.log_softmax
    return model


def identity_of(
    settings: ModelConfig, classes: tuple[str, ...], input: InputSpec, *, multilabel: bool = False
) -> ModelIdentity:
    """Return everything that has to be equal for weights to fit the model that `settings` describe."""
    identity = ModelIdentity(
        settings.name, classes, input.channels, input.height, input.width, multilabel=multilabel
    )
    if find(settings.name).stages is None:
        return identity
    head, hidden_size = settings.head_size
    return dataclasses.replace(identity, head=head, hidden_size=hidden_size, features_at=settings.cut)


def settings_of(identity: ModelIdentity) -> ModelConfig:
    """Return the settings of a model without pretrained weights or frozen layers."""
    stages = find(identity.name).stages
    if stages is None:
        return ModelConfig(name=identity.name)
    return ModelConfig(
        name=identity.name,
        head=cast(Head, identity.head),
        hidden_size=identity.hidden_size,
        features_at=cast(FeaturesAt, identity.features_at),
        weights="none",
    )


def skeleton(
    settings: ModelConfig,
    num_classes: int = 1000,
    input: InputSpec | None = None,
    *,
    multilabel: bool = False,
) -> nn.Module:
    """Build a model without values: all layers have their shapes, and nothing is loaded."""
    spec = find(settings.name)
    bare = dataclasses.replace(settings, weights="" if settings.has_weights else settings.weights)
    with WithoutValues():
        return _scoring(spec.build(input or spec.default_input, num_classes, bare), multilabel)


def with_head(settings: BackboneConfig) -> ModelConfig:
    """Return `settings` as those of a whole model, with a linear head if they name none."""
    return settings if isinstance(settings, ModelConfig) else ModelConfig(**vars(settings), head="linear")


def build_frozen(settings: BackboneConfig, side: int) -> FrozenBackbone:
    """Build the frozen layers of a model with their weights, on the CPU.

    Args:
        settings: The model and its weights.
        side: Height and width of the pictures in pixels.

    Raises:
        UserError: if the model has no frozen layers with these settings, or its weights can't be used.
    """
    spec, model = find(settings.name), with_head(settings)
    if spec.build_frozen is not None:
        spec.check_settings(model)
    backbone = spec.build_frozen(side, model) if spec.build_frozen is not None else None
    if backbone is None:
        raise UserError(
            f"--model {settings.name} has no frozen layers with these settings, so no features to compute "
            "once: choose a classifier of torchvision with --weights, and fewer --trainable-stages"
        )
    return backbone
