"""Programs that start within milliseconds, forked from processes that have imported their packages.

Most of the time of a short run of Snakemake or of a tool goes into importing packages. Here, a
process imports them once, and each run is a fork of it: a process of its own with the arguments,
working directory, environment, standard streams and exit status that it would otherwise have.
mpt_trt is never imported beforehand, so a run uses the code of its own folder. A run cannot
show that an import is missing, because all modules of the packages are there. Tests of imports,
signals and process groups start the real Python.
"""
