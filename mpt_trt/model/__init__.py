"""The MPT model: architecture, tensors, division among ranks, and one block in PyTorch."""
