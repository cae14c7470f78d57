"""Batch prediction: the work units of a listing, their result files in Parquet, and the manifest."""
