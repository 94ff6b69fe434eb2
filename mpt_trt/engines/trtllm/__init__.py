"""Checkpoints and engines of TensorRT-LLM."""
