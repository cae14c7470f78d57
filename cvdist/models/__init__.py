"""Image classifiers by name."""

from cvdist.models import scratch_cnn  # noqa: F401  (its models register themselves)
from cvdist.models.registry import InputSpec, ModelSpec, build_model, find, names, register

__all__ = ["InputSpec", "ModelSpec", "build_model", "find", "names", "register"]
