"""Several commands in one process, and one command on several ranks."""
