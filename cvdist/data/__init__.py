"""Data sets, image decoding, augmentation, normalization and the order of samples in an epoch."""
