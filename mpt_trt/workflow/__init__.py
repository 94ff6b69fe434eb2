"""Facts that Snakemake needs to plan jobs: configuration, target names, resources of jobs."""
