"""Metrics of fit, specificity and distribution, each as defined by its source."""
