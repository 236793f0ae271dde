"""Many methods on one screen: fitted, scored, summarised, and reported."""
