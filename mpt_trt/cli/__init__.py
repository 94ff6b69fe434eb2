"""Shared parts of the commands: options, exit codes, progress."""
