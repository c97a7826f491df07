"""The server in one round, one file per protection."""
