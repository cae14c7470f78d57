"""Data sets, decoding, augmentation and the order of samples."""
