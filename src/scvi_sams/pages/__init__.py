"""Pages of HTML that need nothing but themselves, in one style."""
