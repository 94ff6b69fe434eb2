"""The Python interface: a loaded engine that generates text."""
