"""What was done to each cell: labels and doses, read once and kept as values."""
