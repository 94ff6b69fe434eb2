"""Checkpoints and engines of TensorRT-LLM, the second backend."""
