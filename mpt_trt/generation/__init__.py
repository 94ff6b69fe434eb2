"""Choosing tokens with any StepModel: greedy, sampling, beam search."""
