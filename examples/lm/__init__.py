"""The server's parts: a llama-type model in NumPy and Numba, its paged KV cache, and the loop that serves prompts."""
