"""Starts what the configuration asks for, watches it, and ends it, whatever happens to itself."""
