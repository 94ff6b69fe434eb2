"""A page, a table and plots from finished measurements."""
