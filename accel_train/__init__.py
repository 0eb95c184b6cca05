"""A trainer for small transformer language models that survives any kill with the same bits."""

__version__ = "0.1.0"
