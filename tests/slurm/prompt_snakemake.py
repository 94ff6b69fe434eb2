"""Snakemake whose SLURM plugin asks for the states of jobs every second.

prompt_snakemake.py PYTHON ARGUMENTS...

PYTHON: the one that jobs start Snakemake and tools with. By itself, the plugin waits 10 s longer
after each time that no job has ended, which is most of the time of a chain of short jobs.
"""

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

SECONDS = 1

if __name__ == "__main__":
    Executor.next_seconds_between_status_checks = property(
        lambda executor: SECONDS, lambda executor, seconds: None
    )
    sys.executable = sys.argv.pop(1)
    sys.exit(main())
