"""Engines: one module a runtime behind one small interface, and the directory that holds them."""
