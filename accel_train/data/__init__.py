"""Data: order, windows, loading, and artifacts that are built once and shared."""
