"""Perturbations and doses of each cell, parsed once and kept as values."""
