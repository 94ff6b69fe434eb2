"""TensorRT, CUDA's runtime and NCCL without a GPU, for tests.

They compute what the real ones compute, on the very addresses that they are given, and as late as
the real ones may. Uses that their documentation forbids raise `Violation`, which names the rule.
"""
