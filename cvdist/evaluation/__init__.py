"""Evaluation of trained models on labeled pictures: metrics, calibration, and the comparison of two models."""
