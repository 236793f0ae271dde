"""Splits into training, validation and test cells: seeded, pure functions of the labels."""
