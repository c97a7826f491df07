"""The benchmark book: ``secure-fedprompt bench``. A chapter is a module here."""
