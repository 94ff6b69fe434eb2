"""Page, table and plots from finished measurements."""
