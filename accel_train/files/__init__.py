"""Files and directories that are complete or absent."""
