"""Checkpoints, from which a run continues: their format, and a store for folders and buckets."""
