"""Image classifiers by name, with their heads and pretrained weights."""

from cvdist.config import HeadSize
from cvdist.models import scratch_cnn, transfer  # noqa: F401  (their models register themselves)
from cvdist.models.frozen import FrozenAndTrained, FrozenBackbone, frozen_and_trained, with_trained
from cvdist.models.library import Preprocessing
from cvdist.models.registry import (
    InputSpec,
    ModelSpec,
    build_frozen,
    build_model,
    find,
    identity_of,
    names,
    register,
    settings_of,
    skeleton,
)
from cvdist.models.weights import (
    Origin,
    needs_normalization,
    origin,
    prepare,
    prepare_with_cut,
    preprocessing,
    with_preprocessing,
)

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
    "identity_of",
    "names",
    "needs_normalization",
    "origin",
    "prepare",
    "prepare_with_cut",
    "preprocessing",
    "register",
    "settings_of",
    "skeleton",
    "with_preprocessing",
    "with_trained",
]
