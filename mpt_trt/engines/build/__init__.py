"""Building of engine directories from FT checkpoints."""
