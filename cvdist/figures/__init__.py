"""Figures of a run. They are drawn without pyplot, which keeps global state, so that any thread can draw."""
