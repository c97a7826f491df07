"""Federations from Python: ``secure_fedprompt.simulate`` and ``secure_fedprompt.Federation``."""
