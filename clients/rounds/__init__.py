"""A client in one round, one file per protection."""
