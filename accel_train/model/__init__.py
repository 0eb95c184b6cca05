"""The transformer: its key-value cache, the tensors it can return, its size, and generation."""
