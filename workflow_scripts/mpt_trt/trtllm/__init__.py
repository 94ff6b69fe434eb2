"""TensorRT-LLM (0.20 to 1.2.1) as a backend: its checkpoint, and what calls its tools."""
