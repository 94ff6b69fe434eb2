"""The operating system: files, processes, MPI, GPUs."""
