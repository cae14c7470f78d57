"""Pictures of a run. Drawn without pyplot, whose state is shared, so that any thread may draw."""
