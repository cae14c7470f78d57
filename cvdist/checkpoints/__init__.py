"""What a run needs to continue: its format, and one store for folders and buckets."""
