"""Image classifiers by name, with their heads and pretrained weights."""

from cvdist.config import HeadSize
from cvdist.models import scratch_cnn, vgg  # noqa: F401  (their models register themselves)
from cvdist.models.frozen import FrozenAndTrained, FrozenBackbone, frozen_and_trained, with_trained
from cvdist.models.registry import (
    InputSpec,
    ModelSpec,
    build_frozen,
    build_model,
    find,
    head_of,
    names,
    register,
    skeleton,
)
from cvdist.models.weights import Origin, Preprocessing, origin, prepare, preprocessing

__all__ = [
    "FrozenAndTrained",
    "FrozenBackbone",
    "HeadSize",
    "InputSpec",
    "ModelSpec",
    "Origin",
    "Preprocessing",
    "build_frozen",
    "build_model",
    "find",
    "frozen_and_trained",
    "head_of",
    "names",
    "origin",
    "prepare",
    "preprocessing",
    "register",
    "skeleton",
    "with_trained",
]
