"""How a network multiplies by the matrices of its blocks: one module a kind of weights."""

# Matrices that are quantized at a time when a network is written, where there are as many cores.
NETWORK_WORKERS = 4
