"""Device code: what runs on the GPU, and how it becomes a cubin. Installed and imported as ``kvortex.kernels``."""
