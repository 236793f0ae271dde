"""Predictions without a model, or with a very small one: what any model has to beat."""
