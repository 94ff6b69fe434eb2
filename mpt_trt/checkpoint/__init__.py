"""A Hugging Face checkpoint, from the hub or a folder: config, tensors, tokenizer."""
