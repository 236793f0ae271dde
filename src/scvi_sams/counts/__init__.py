"""Counts of cells: validated, and read in blocks."""
