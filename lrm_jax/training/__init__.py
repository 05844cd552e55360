"""Training: setup from a config, the training step, losses, optimiser, loop, checkpoints and reports."""
