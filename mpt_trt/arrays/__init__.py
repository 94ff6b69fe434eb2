"""Casting and transposing blocks of NumPy arrays."""
