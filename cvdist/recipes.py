"""Recipes: functions that return a complete configuration.

`mnist_cnn(epochs=3)` is the recipe with a field changed, by the name of its flag. To derive a recipe, call
another one with the fields that differ. The first line of the docstring is what `jobs/train.py --help` shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from cvdist.config import TrainConfig, replace
from cvdist.errors import UserError, did_you_mean


class Recipe(Protocol):
    """A function that returns a configuration; `changes` override its fields by the names of their flags."""

    __doc__: str | None

    def __call__(self, **changes: Any) -> TrainConfig: ...


_RECIPES: dict[str, Recipe] = {}


def recipe(function: Callable[[], TrainConfig]) -> Recipe:
    """Register `function` under its name, with hyphens for underscores, and let it take overrides."""
    name = function.__name__.replace("_", "-")

    @functools.wraps(function)
    def made(**changes: Any) -> TrainConfig:
        return replace(function(), **{"recipe": name, **changes})

    _RECIPES[name] = made
    return made


def names() -> dict[str, str]:
    """Return each recipe's name and the first line of its description."""
    return {name: (make.__doc__ or "").strip().splitlines()[0] for name, make in _RECIPES.items()}


def find(name: str, **changes: Any) -> TrainConfig:
    """Return the configuration of the recipe `name`, with the same `changes` as the recipe itself takes.

    Raises:
        UserError: if there is none; the message has the nearest names.
    """
    if name not in _RECIPES:
        hint = did_you_mean(name, _RECIPES, f"there are: {', '.join(_RECIPES)}")
        raise UserError(f"unknown recipe {name!r}: {hint}")
    return _RECIPES[name](**changes)


@recipe
def mnist_cnn() -> TrainConfig:
    """The book's chapter 6: a CNN from scratch on all 70,000 MNIST digits, 20 epochs.

    SGD with learning rate 0.01 and momentum 0.5, batches of 32, dropout 0.5, float32.
    The book reports 98.9% on the test set.
    """
    return replace(TrainConfig(), dataset="mnist", precision="float32", channels_last=False)


@recipe
def digits_cnn() -> TrainConfig:
    """The demo: the same CNN on 5,000 real digits that need no download, a minute on two cores.

    A sixteenth of the data asks for a higher learning rate and a cosine schedule.
    """
    return mnist_cnn(
        dataset="digits",
        momentum=0.9,
        lr=0.02,
        lr_scheduler="cosine",
        lr_warmup_epochs=0.5,
        dropout=0.25,
        rotation=10.0,
        translation=0.08,
    )


@recipe
def dogs_cats_cnn() -> TrainConfig:
    """The book's chapter 6: a CNN from scratch on photographs of dogs and cats, 224 pixels, 20 epochs.

    Name the pictures with `--data`. SGD with learning rate 0.01 and momentum 0.5, batches of 32, dropout 0.5.
    The book reports about 75% on 2,000 photographs after training on 23,000, and a growing gap to the training
    accuracy.
    """
    return replace(
        TrainConfig(),
        dataset="images",
        model="scratch-cnn-photo",
        log_every_steps=10,
        valid_batch_size=100,
    )


@recipe
def dogs_cats_cnn_augmented() -> TrainConfig:
    """`dogs-cats-cnn` for fewer pictures: 96 pixels, mirrored and cropped at random, AdamW for 80 epochs.

    Learning rate 0.001 with a warm-up of 2 epochs and a cosine schedule, weight decay 0.05. From 1,600
    photographs it gets 72 to 76% of 400 others right, where `dogs-cats-cnn` gets 62%.
    """
    return dogs_cats_cnn(
        image_size=96,
        horizontal_flip=0.5,
        random_resized_crop=0.5,
        optimizer="adamw",
        lr=0.001,
        weight_decay=0.05,
        lr_scheduler="cosine",
        lr_warmup_epochs=2.0,
        epochs=80,
    )


@recipe
def dogs_cats_vgg16() -> TrainConfig:
    """The book's transfer learning: VGG16's pretrained convolutions, frozen, and a new classifier.

    Name the pictures with `--data`. SGD with momentum 0.9, a learning rate of 0.0002 that warms up and decays
    by a cosine, batches of 64, dropout 0.5, 3 epochs. The batches are large
    because each step reads and writes the 119 million weights of the classifier, whatever the batch.
    """
    return replace(
        TrainConfig(),
        dataset="images",
        model="vgg16",
        weights="IMAGENET1K_V1",
        features_at="maps",
        lr=0.0002,
        momentum=0.9,
        lr_scheduler="cosine",
        lr_warmup_epochs=0.3,
        epochs=3,
        batch_size=64,
        log_every_steps=10,
        valid_batch_size=100,
        keep_checkpoints=1,
    )


@recipe
def dogs_cats_vgg16_dropout() -> TrainConfig:
    """`dogs-cats-vgg16` with dropout 0.2.

    The book reports 98.45% on 2,000 photographs.
    """
    return dogs_cats_vgg16(dropout=0.2)


@recipe
def dogs_cats_vgg16_augmented() -> TrainConfig:
    """`dogs-cats-vgg16` with dropout 0.2, and pictures mirrored and turned at random.

    They are turned by up to 10 degrees. The book turns them by up to 0.2 degrees, see `docs/book.md`, and
    reports 98.5% on 2,000 photographs.
    """
    return dogs_cats_vgg16_dropout(horizontal_flip=0.5, rotation=10.0)


@recipe
def dogs_cats_vgg16_features() -> TrainConfig:
    """`dogs-cats-vgg16-dropout` from a cache of features (`jobs/preprocess.py`), 5 epochs of seconds each.

    Name the cache with `--features`. The result is a complete VGG16, which takes pictures.
    """
    return dogs_cats_vgg16_dropout(epochs=5)


@recipe
def dogs_cats_vgg16_mlp() -> TrainConfig:
    """`dogs-cats-vgg16-features` with a small head: one hidden layer of 256 units on each channel's mean.

    It has a thousandth of the weights of the book's classifier, so an epoch takes a fraction of a second.
    """
    return dogs_cats_vgg16_features(head="mlp", lr=0.001)


@recipe
def dogs_cats_vgg16_probe() -> TrainConfig:
    """`dogs-cats-vgg16-features` with a linear probe, which tells how far the convolutions alone get.

    The learning rate is so small because 25,088 inputs share each output.
    """
    return dogs_cats_vgg16_features(head="linear", lr=0.00001)


@recipe
def transfer() -> TrainConfig:
    """Any pretrained network, any pictures: a new last layer on what the network computes, 10 epochs.

    Name the pictures with `--data`, and the network with `--model` and `--weights`: torchvision's MobileNetV2
    if none is named. Pictures are prepared as its weights expect. AdamW with learning rate 0.001 and a cosine
    schedule, batches of 64. `--trainable-stages 1 --backbone-lr-scale 0.1` also trains the last stage.
    """
    return replace(
        TrainConfig(),
        dataset="images",
        image_size=0,
        resize="weights",
        model="mobilenet_v2",
        weights="DEFAULT",
        head="linear",
        optimizer="adamw",
        lr=0.001,
        weight_decay=0.01,
        lr_scheduler="cosine",
        lr_warmup_epochs=0.3,
        epochs=10,
        batch_size=64,
        log_every_steps=10,
        valid_batch_size=100,
        keep_checkpoints=1,
    )


@recipe
def transfer_features() -> TrainConfig:
    """`transfer` from a cache of features (`jobs/preprocess.py`), solved as a logistic regression, in seconds.

    Name the cache with `--features`. The result is the complete network, which takes pictures. Other heads, and
    `--fit epochs`, train for 30 epochs.
    """
    return transfer(fit="logistic", epochs=30)
