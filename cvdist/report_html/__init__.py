"""A run on one page: a file of HTML that needs nothing else, from plain values. Knows nothing of MLflow."""
