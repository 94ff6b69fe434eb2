"""Building and running engines: one sub-package per runtime behind one interface."""
