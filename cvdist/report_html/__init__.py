"""The report of a run: one self-contained HTML file, made from plain values. Does not depend on MLflow."""
