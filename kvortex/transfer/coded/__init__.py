"""Coded records on a GPU: plans of their transfers, and what each codec launches."""
