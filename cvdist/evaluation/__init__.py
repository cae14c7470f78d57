"""Measuring trained models: exact counts, calibration, and one model against another on the same pictures."""
