"""What a model's activations say about scales, through ModelOpt, and the npz that keeps it."""
