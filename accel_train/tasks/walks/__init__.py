"""The walks task: a model that walks a graph and obeys its rules."""
