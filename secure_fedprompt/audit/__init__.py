"""Reading, checking and comparing audit logs: ``secure-fedprompt audit``."""
