"""Arithmetic of the quantization schemes: integers, E4M3, smoothing. Touches no files."""
