"""Image classifiers by name."""

from cvdist.config import HeadSize
from cvdist.models import scratch_cnn, vgg  # noqa: F401  (their models register themselves)
from cvdist.models.parts import FrozenPart, Parts, split, with_trained
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
    "FrozenPart",
    "HeadSize",
    "InputSpec",
    "ModelSpec",
    "Origin",
    "Parts",
    "Preprocessing",
    "build_frozen",
    "build_model",
    "find",
    "head_of",
    "names",
    "origin",
    "prepare",
    "preprocessing",
    "register",
    "skeleton",
    "split",
    "with_trained",
]
