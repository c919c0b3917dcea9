"""Measurements: one file a question, ``python -m perf NAME``."""
