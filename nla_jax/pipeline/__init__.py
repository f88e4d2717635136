"""A run: its directory, its stages in order, and how to begin and read one."""
