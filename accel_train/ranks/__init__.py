"""The processes of one run: what they agree on, and how they wait for each other."""
