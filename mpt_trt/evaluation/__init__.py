"""How far an engine is from the float32 reference, and how fast it is."""
