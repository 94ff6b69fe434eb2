"""Linear layers of the network, one module per way to store their weights."""

# Matrices that are quantized at a time when a network is written, where there are as many cores.
NETWORK_WORKERS = 4
