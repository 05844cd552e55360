"""Metrics: perceptual distances and their networks, distances between surfaces, and the mean object as a baseline."""
