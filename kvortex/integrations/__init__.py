"""Connections to other software, each in a file of its own that imports it."""
