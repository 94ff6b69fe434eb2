"""What an MPT is: architecture, tensors, which rank holds what, one block in PyTorch."""
