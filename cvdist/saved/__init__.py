"""Trained models, opened for use from wherever they are kept."""

from cvdist.saved.model import SavedModel
from cvdist.saved.open import open_model

__all__ = ["SavedModel", "open_model"]
