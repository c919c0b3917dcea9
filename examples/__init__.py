"""A small language model server that keeps its KV cache in kvortex; see README.md beside this file."""
