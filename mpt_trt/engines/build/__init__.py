"""From an FT checkpoint to an engine directory."""
