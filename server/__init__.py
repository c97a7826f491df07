"""The aggregating server. It holds no model and imports no torch."""
