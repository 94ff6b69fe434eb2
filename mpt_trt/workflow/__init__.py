"""What Snakemake must know before anything runs: configuration, target names, resources of jobs."""
