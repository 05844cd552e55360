"""What compares: perceptual distances with their networks, distances of surfaces, the mean object as a baseline."""
