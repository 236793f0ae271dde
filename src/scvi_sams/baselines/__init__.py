"""Baselines: predictions without a model, or with a very small one, that a model has to beat."""
