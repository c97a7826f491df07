"""Federated prompt methods behind one interface."""
