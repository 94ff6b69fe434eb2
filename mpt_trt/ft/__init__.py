"""FasterTransformer checkpoints: layout, reading, writing."""
