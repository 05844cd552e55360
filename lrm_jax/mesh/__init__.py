"""From a field to a triangle mesh and to its files."""
