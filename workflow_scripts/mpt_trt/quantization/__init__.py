"""Quantized weights, activations and KV caches: how they are chosen, calibrated and laid out."""
