"""Calibration of scales from a model's activations, through ModelOpt, and its npz file."""
