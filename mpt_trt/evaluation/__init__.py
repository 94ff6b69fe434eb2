"""Distance of an engine from the float32 reference, quality on held-out text, and speed."""
