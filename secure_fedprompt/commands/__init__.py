"""The commands of ``secure-fedprompt``, each in a file of its name."""
