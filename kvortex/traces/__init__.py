"""Traces of requests: read and recorded, played on an index alone, and what no policy could exceed on them."""
