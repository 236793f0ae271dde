"""Which cells train and which are predicted: seeded, pure functions of the labels."""
