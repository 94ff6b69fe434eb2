"""Linear layers of the network, with one module per storage of weights."""

# Maximum number of matrices that are quantized in parallel when a network is written.
NETWORK_WORKERS = 4
