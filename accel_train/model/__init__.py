"""The transformer, what can be extracted from it, and generation."""
