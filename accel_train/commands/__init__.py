"""The command line: dispatch, one-line errors, tables for people."""
