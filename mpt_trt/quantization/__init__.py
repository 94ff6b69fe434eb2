"""Arithmetic of the quantization schemes, without files: integers, E4M3, smoothing."""
