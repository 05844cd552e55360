"""Processes, the device mesh, and what lies on it. Everything else may import from here."""
