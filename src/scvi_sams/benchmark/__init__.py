"""Compare methods on one screen: fit, score, summarise, and report."""
