"""Engines as models of the Language Model Evaluation Harness, the package `lm_eval`."""
