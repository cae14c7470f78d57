"""Open trained models from MLflow, checkpoints and weight files."""

from cvdist.saved.model import SavedModel
from cvdist.saved.open import open_model

__all__ = ["SavedModel", "open_model"]
