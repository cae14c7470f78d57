"""The registry of models: builds them by name, and checks that pictures and settings fit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from cvdist.config import BackboneConfig, HeadSize, ModelConfig
from cvdist.errors import UserError, did_you_mean
from cvdist.models.frozen import FrozenBackbone

BLOCKS = 5  # of convolutions in a model that goes on from pretrained weights: all of VGG's sizes have five


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
        summary: one line for listings.
        default_input: shape of the pictures that it was designed for; `check` says what else it takes.
        smallest_side: smallest height and width in pixels for which its convolutions have any output.
        build: builds the model from (input, number of classes, settings), with weights on the default device.
            The model takes float (n, channels, height, width), where n may be 0, and returns scores (n, number
            of classes), whose softmax gives the probabilities. Log-probabilities are such scores too.
        any_channels: whether it can be built for any number of channels, or only for those of default_input.
        pretrained: whether it can start from pretrained weights (`--weights`, `--trainable-blocks`).
        build_frozen: builds only the frozen layers with their weights; None if the settings freeze none.
    """

    name: str
    summary: str
    default_input: InputSpec
    smallest_side: int
    build: Callable[[InputSpec, int, ModelConfig], nn.Module]
    any_channels: bool = True
    pretrained: bool = False
    build_frozen: Callable[[ModelConfig], FrozenBackbone | None] | None = None

    def check(self, input: InputSpec) -> None:
        """Check that the model can be built for pictures of this shape.

        Raises:
            UserError: if not, in one line that says what the model takes.
        """
        if min(input.height, input.width) < self.smallest_side:
            raise UserError(
                f"--model {self.name} takes pictures of {self.smallest_side}x{self.smallest_side} pixels or "
                f"more, these are {input.height}x{input.width}: use larger pictures or another model"
            )
        takes = self.default_input.channels
        if input.channels != takes and not self.any_channels:
            raise UserError(
                f"--model {self.name} takes pictures of {takes} channels, these have {input.channels}: use "
                "color pictures or another model"
            )

    def check_settings(self, settings: ModelConfig) -> None:
        """Check that the settings make sense for this model and none of them would be ignored.

        Raises:
            UserError: if not, in one line that names the flag.
        """
        if self.pretrained:
            if not settings.has_weights and settings.trainable_blocks < BLOCKS:
                raise UserError(
                    f"--model {self.name} without --weights would freeze convolutions that are random: name "
                    f"--weights, or train all of them with --trainable-blocks {BLOCKS}"
                )
            if settings.head == "linear" and settings.hidden_size:
                raise UserError(
                    f"--hidden-size {settings.hidden_size} is for --head vgg and mlp, the linear head has no "
                    "hidden layer: leave it out, or choose one of these"
                )
            return
        pretraining = {
            "weights": settings.has_weights,
            "trainable-blocks": settings.trainable_blocks > 0,
            "head": settings.head != ModelConfig.head,
            "hidden-size": settings.hidden_size > 0,
        }
        for flag, given in pretraining.items():
            if given:
                able = ", ".join(name for name, spec in MODELS.items() if spec.pretrained)
                raise UserError(
                    f"--{flag} is for models that go on from pretrained weights, not for --model {self.name}: "
                    f"leave it out, or choose one of {able}"
                )


MODELS: dict[str, ModelSpec] = {}


def register(spec: ModelSpec) -> None:
    """Add a model to the registry.

    Raises:
        ValueError: if there is a model with this name already.
    """
    if spec.name in MODELS:
        raise ValueError(f"a model named {spec.name!r} is registered already")
    MODELS[spec.name] = spec


def names() -> dict[str, str]:
    """Return the summary of each model by name."""
    return {name: spec.summary for name, spec in MODELS.items()}


def find(name: str) -> ModelSpec:
    """Return the registry's entry for `name`.

    Raises:
        UserError: if there is none; the message lists similar names, or all.
    """
    if name not in MODELS:
        hint = did_you_mean(name, MODELS, f"--model takes: {', '.join(MODELS)}")
        raise UserError(f"unknown model {name!r}: {hint}")
    return MODELS[name]


def build_model(settings: ModelConfig, input: InputSpec, num_classes: int) -> nn.Module:
    """Build a new model.

    Random weights come from PyTorch's global generator, so seed that first.

    Args:
        settings: name and settings of the model.
        input: shape of the pictures.
        num_classes: number of outputs.

    Raises:
        UserError: if there is no such model, or it can't be built for these pictures or settings.
    """
    spec = find(settings.name)
    spec.check(input)
    spec.check_settings(settings)
    return spec.build(input, num_classes, settings)


def head_of(settings: ModelConfig) -> HeadSize:
    """Return the head that `settings` choose; its name is empty for a model without a choice of heads."""
    spec = MODELS.get(settings.name)
    return settings.head_size if spec is not None and spec.pretrained else HeadSize("", 0)


def skeleton(settings: ModelConfig, num_classes: int = 1000) -> nn.Module:
    """Build a pretrained model on the meta device: all layers have their shapes, but no values are loaded."""
    spec = find(settings.name)
    bare = dataclasses.replace(settings, weights="", trainable_blocks=BLOCKS)
    with torch.device("meta"):
        return spec.build(spec.default_input, num_classes, bare)


def with_head(settings: BackboneConfig) -> ModelConfig:
    """`settings` as those of a whole model: with the default head where they name none."""
    return settings if isinstance(settings, ModelConfig) else ModelConfig(**vars(settings))


def build_frozen(settings: BackboneConfig) -> FrozenBackbone:
    """Build the frozen layers of a model with their weights, on the CPU.

    Raises:
        UserError: if the model has no frozen layers with these settings, or its weights can't be used.
    """
    spec, model = find(settings.name), with_head(settings)
    spec.check_settings(model)
    backbone = spec.build_frozen(model) if spec.build_frozen else None
    if backbone is None:
        raise UserError(
            f"--model {settings.name} has no frozen layers with these settings, so no features to compute "
            "once: choose a VGG with --weights, and --trainable-blocks below 5"
        )
    return backbone
