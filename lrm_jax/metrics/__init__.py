"""Metrics: perceptual distances and their networks, distances between surfaces, and two baselines: the mean object and the visual hull."""
