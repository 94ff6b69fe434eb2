"""The work of each command: one module per script, with `run(options)`."""
