"""Choosing tokens over anything that steps: greedy, sampling, beam search."""
