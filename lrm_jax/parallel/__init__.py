"""Processes, the device mesh, and the arrays on it. All other packages may import from here."""
