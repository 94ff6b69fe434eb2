"""How a network multiplies by the matrices of its blocks: one module a kind of weights."""
