"""Everything that runs beside private data."""
