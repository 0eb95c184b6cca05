"""Files and directories that are whole or absent."""
