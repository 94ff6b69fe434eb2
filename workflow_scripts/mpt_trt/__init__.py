"""From a Hugging Face MPT checkpoint to verified TensorRT engines."""
