"""The text task: a model that continues a text."""
