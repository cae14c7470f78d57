"""The feature cache: outputs of a model's frozen layers, computed once for all pictures and stored in shards.

    extraction   changes -> resumable map of extract -> shards -> build -> manifest     (`jobs/preprocess.py`)
    training     manifest -> local -> copies -> loader                      (`--features URI`)

`docs/feature-format.md` describes the stored files, `docs/architecture.md` the guarantees.
"""
