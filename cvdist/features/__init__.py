"""The feature cache: frozen layers run once over all pictures, their output sharded in storage.

    extraction   plan -> extract -> shard, receipt -> build -> manifest     (`jobs/preprocess.py`)
    training     manifest -> local -> copies -> loader                      (`--features URI`)

`docs/feature-format.md` says what lies in storage, `docs/architecture.md` what is guaranteed.
"""
