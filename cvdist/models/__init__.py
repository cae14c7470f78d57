"""Image classifiers by name."""

from cvdist.models import scratch_cnn, vgg  # noqa: F401  (their models register themselves)
from cvdist.models.parts import FrozenPart, Parts, split, with_trained
from cvdist.models.registry import InputSpec, ModelSpec, build_frozen, build_model, find, names, register
from cvdist.models.weights import Origin, Preprocessing, origin, prepare, preprocessing

__all__ = [
    "FrozenPart",
    "InputSpec",
    "ModelSpec",
    "Origin",
    "Parts",
    "Preprocessing",
    "build_frozen",
    "build_model",
    "find",
    "names",
    "origin",
    "prepare",
    "preprocessing",
    "register",
    "split",
    "with_trained",
]
