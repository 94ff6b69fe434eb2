"""What the operating system gives: files, processes, MPI, GPUs."""
