"""A run: its directory, lock, record and figures, and what is done with it."""
