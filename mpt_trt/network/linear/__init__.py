"""Linear layers of the network, one module per way to store their weights."""

# Maximum number of matrices that are quantized in parallel when a network is written.
NETWORK_WORKERS = 4
