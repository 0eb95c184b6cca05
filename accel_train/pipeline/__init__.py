"""From a corpus to a validated model with one command."""
