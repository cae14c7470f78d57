"""Batch prediction: which pictures there are, slice by slice to parquet, and the manifest of the results."""
