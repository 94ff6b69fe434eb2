"""Facts that others published about a model, and an engine's comparison with them."""
