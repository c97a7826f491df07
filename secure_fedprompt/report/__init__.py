"""A run as one self-contained page: ``secure-fedprompt report``."""
