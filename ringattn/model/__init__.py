"""The transformer, its sharding, loss and scoring. `build.py` builds a model from a config."""
