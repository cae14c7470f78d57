"""cvdist: distributed training of image classifiers on clusters."""

__version__ = "0.1.0"
