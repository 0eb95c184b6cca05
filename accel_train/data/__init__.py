"""Data: the order of samples, windows of token streams, loading, and samples on the GPU."""
