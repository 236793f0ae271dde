"""Metrics, each by the definition of its source: fit, specificity and distribution."""
